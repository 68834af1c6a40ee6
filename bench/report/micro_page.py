"""The page of microbenchmarks, from reports/data/micro alone: each optimization's op beside what the device can do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import micro_records
from bench.micro_records import MicroRecord
from bench.report.micro import HEADER, row_cells
from bench.report.text import MARK, NOTHING, code, number, percent, prose, scalar, table
from kernels.registry import is_negative

PAGE = Path("micro") / "README.md"
COPY_AIM, REFERENCE_AIM = 0.85, 0.95
COLUMNS = (0, 2, 3, *range(5, len(HEADER)))  # of `HEADER`: all but the shape and the errors
WHAT = (
    "Each optimization's op on its own, forward plus backward, with a cold L2: checked against PyTorch first, then timed in "
    "turn with it. The newest record of each optimization and device counts. Workloads that are small enough for a CPU box "
    "are left out here."
)
LEGEND = (
    "The ratio is the reference's time over the candidate's, in brackets its 95 % interval; forward is the candidate's "
    "alone. The ceiling is the time floor that the copy bandwidth and the matrix rate above set, whichever takes longer. "
    "Copies that move as many bytes in two launches take the last column's share of the time."
)
AIM = (
    f"The aim is {100 * COPY_AIM:.0f} % of the copy bandwidth where traffic sets the floor, and {REFERENCE_AIM}x the "
    "reference's speed where arithmetic does, as in matrix products."
)
COPIES = (
    "Where traffic sets the floor, what is reached is a share of the rate of one very large copy, and the last column a "
    "share of what copies of only as many bytes as the workload moves attain, in two launches: what is low in the "
    "first and high in the last falls short because it is small, and what is low in both because of its kernels."
)
NONE = "No workload that is not small was timed."


@dataclass(frozen=True)
class Timed:
    """One workload that was timed and is not small: a row of a `run_micro` result."""

    optimization: str
    workload: str
    row: Mapping[str, Any]

    @property
    def bound_by_bytes(self) -> bool:
        return self.row["of_copies"] is not None

    @property
    def missing(self) -> float:
        """By how much it falls short of its aim: a fraction of the copy bandwidth, or of the reference's speed; 0 where it
        does not."""
        short = COPY_AIM - self.row["of_ceiling"] if self.bound_by_bytes else REFERENCE_AIM - self.row["ratio"]
        return max(short, 0.0)

    def cells(self) -> tuple[str, ...]:
        cells = row_cells(self.workload, self.row)
        known = self.optimization.isidentifier()  # a record may say anything
        negative = ", a negative result" if known and is_negative(self.optimization) else ""
        return (code(self.optimization) + negative, *(cells[column] for column in COLUMNS))


def files(data_dir: Path) -> dict[Path, bytes]:
    """The page, relative to the folder of reports, and its bytes; empty where there is no record. Raises UserError naming
    file and line for a record that is not valid."""
    devices = micro_records.load(data_dir)
    return {PAGE: page(devices).encode("utf-8", "replace")} if devices else {}


def page(devices: Mapping[str, Sequence[MicroRecord]]) -> str:
    """Markdown of `reports/micro/README.md`, from the records of each device, by slug; at least one each."""
    sections = [f"<!-- {MARK} -->\n# Microbenchmarks", WHAT]
    for slug in sorted(devices):
        sections += _device(slug, newest(devices[slug]))
    return "\n\n".join((*sections, "[All reports](../README.md)")) + "\n"


def newest(records: Iterable[MicroRecord]) -> list[MicroRecord]:
    """The newest record of each optimization, by name; of two of one second the later line."""
    found = {record.optimization: record for record in sorted(records, key=lambda record: record.finished)}
    return [found[name] for name in sorted(found)]


def _device(slug: str, records: Sequence[MicroRecord]) -> list[str]:
    timed = [one for record in records for one in _timed(record)]
    header = ("optimization", *(HEADER[column] for column in COLUMNS))
    whole = table(header, [one.cells() for one in timed], numeric=range(4, len(header)))
    untimed = [f"- {code(record.optimization)}: {why}." for record in records if (why := _why_untimed(record))]
    return [
        f"## {prose(_one_of(records, 'device') or slug)}",
        _provenance(records),
        f"### Below the aim\n\n{AIM}",
        _below(timed),
        "### All of them",
        f"{whole}\n\n{LEGEND}" if timed else NONE,
        *(["Not timed:\n\n" + "\n".join(untimed)] if untimed else []),
        "### Where it comes from",
        _sources(records),
    ]


def _timed(record: MicroRecord) -> list[Timed]:
    rows = record.result["workloads"].items()
    return [Timed(record.optimization, name, row) for name, row in rows if "ratio" in row and not _small(name, row)]


def _small(name: str, row: Mapping[str, Any]) -> bool:
    return name.startswith("small") or row.get("small", False)


def _why_untimed(record: MicroRecord) -> str | None:
    """Why the table has no row of this optimization, as markdown; None where it has one."""
    result = record.result
    if result["untimed"] is not None:
        return f"**{result['level']}**; {prose(result['untimed'].removeprefix('not timed: ').rstrip('.'))}"
    return None if _timed(record) else f"**{result['level']}**; only small workloads fit this device"


def _below(timed: Sequence[Timed]) -> str:
    if not timed:
        return NONE
    missed = sorted((one for one in timed if one.missing), key=lambda one: -one.missing)
    if not missed:
        return f"None: all {len(timed)} that were timed reach it."
    header = (
        "optimization", "workload", "dtype", "the floor is set by", "reached", "short by", "of copies of the same size",
    )  # fmt: skip
    body = table(header, [_miss(one) for one in missed], numeric=(4, 5, 6))
    return f"{len(missed)} of {len(timed)} fall short.\n\n{body}\n\n{COPIES}"


def _miss(one: Timed) -> tuple[str, ...]:
    name, workload, dtype, *_ = one.cells()
    by = number(100 * one.missing if one.bound_by_bytes else one.missing, 2)
    if one.bound_by_bytes:
        reached, short = percent(one.row["of_ceiling"]), f"{by} points"
        return name, workload, dtype, "traffic", reached, short, percent(one.row["of_copies"])
    return name, workload, dtype, "arithmetic", one.cells()[7], f"{by}x", NOTHING


def _provenance(records: Sequence[MicroRecord]) -> str:
    """One line: the device, driver, versions, commits and ceilings of all these records."""
    parts = [prose(_one_of(records, "device") or "unknown device")]
    parts += [f"driver {prose(driver)}"] if (driver := _one_of(records, "driver")) else []
    for package in ("torch", "triton"):
        versions = _distinct((record.environment.get("versions") or {}).get(package) for record in records)
        parts += [f"{package} {prose(versions)}"] if versions else []
    commits = dict.fromkeys(_commit(record) for record in records)
    parts.append(f"commit {', '.join(commits)}")
    measured = [record.result["ceilings"] for record in records if record.result["ceilings"]]
    if measured:
        products = _distinct(f"{top['matmul_dtype']} {top['matmul_size']}³" for top in measured)
        copies = f"copies {_range('copy_bytes_per_s', measured)} (read and written)"
        parts.append(f"ceilings measured: {copies}, {prose(products)} products {_range('matmul_flops_per_s', measured)}")
    return "; ".join(parts) + "."


def _range(name: str, measured: Sequence[Mapping[str, Any]]) -> str:
    values = [float(top[name]) for top in measured]
    return " to ".join(dict.fromkeys(scalar(name, value) for value in (min(values), max(values))))


def _one_of(records: Sequence[MicroRecord], key: str) -> str:
    return _distinct(record.environment.get(key) for record in records)


def _distinct(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))


def _commit(record: MicroRecord) -> str:
    sha, dirty = record.environment.get("git_sha"), record.environment.get("git_dirty")
    return (code(str(sha)[:7]) if sha else "unknown") + (" **with uncommitted changes**" if dirty else "")


def _sources(records: Sequence[MicroRecord]) -> str:
    header = ("optimization", "finished", "commit", "command")
    rows = [
        (code(record.optimization), prose(record.finished_at), _commit(record), code(record.command)) for record in records
    ]
    return table(header, rows)
