"""The microbenchmark of one optimization's op as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.report.text import NOTHING, facts, number, prose, table

HEADER = (
    "workload", "shape", "dtype", "op check", "error, max and mean", "reference µs", "candidate µs", "forward µs",
    "ratio", "TB/s", "TFLOP/s", "of the ceiling", "of copies",
)  # fmt: skip


def micro_section(micro: Mapping[str, Any]) -> str:
    """Markdown of what `bench.micro.run_micro` returned: the op check of every workload, and its times where it has any."""
    if "workloads" not in micro:
        return "## Microbenchmark\n\n" + facts(micro)  # not run_micro's: shown as it is
    rows = [row_cells(name, row) for name, row in micro["workloads"].items()]
    notes = [
        f"Op check: **{micro['level']}**; {prose(str(micro.get('reason') or ''))}.",
        "Errors are the candidate's over PyTorch's in the same dtype, both against fp64; at most 2 (max) and 1.1 (mean).",
    ]
    if micro.get("untimed"):
        notes.append(f"Not timed: {prose(str(micro['untimed']))}.")
    else:
        notes.append(
            "Times are of forward plus backward with a cold L2, in turn; the ceiling is the time floor that the measured "
            "copy bandwidth and matrix rate set. Copies that move as many bytes in two launches take the last column's "
            "share of the time: small ones do not reach the bandwidth of large ones."
        )
    return "\n\n".join(["## Microbenchmark", table(HEADER, rows, numeric=range(4, 13)) if rows else "", " ".join(notes)])


def micro_cell(micro: Mapping[str, Any] | None, dtype: str | None) -> str:
    """One cell: the range of the op's speed-ups over its timed workloads, and the best share of the hardware limit. Only
    those in the dtype that was trained count, where there are any."""
    if not micro or not isinstance(micro.get("workloads"), Mapping):
        return NOTHING
    timed = [row for row in micro["workloads"].values() if "ratio" in row]
    timed = [row for row in timed if row.get("dtype") == dtype] or timed
    if not timed:
        return f"op {prose(str(micro.get('level')))}, not timed" if micro["workloads"] else NOTHING
    low, high = (pick(row["ratio"] for row in timed) for pick in (min, max))
    speed = f"{low:.2f}x" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}x"
    limits = [row["of_ceiling"] for row in timed if row.get("of_ceiling") is not None]
    return speed + (f", {100 * max(limits):.0f} %" if limits else "")


def row_cells(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells under `HEADER` of one workload of a `run_micro` result, as markdown."""
    timed = "ratio" in row
    ratio = f"{row['ratio']:.2f}x [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]" if timed else NOTHING
    return (
        prose(name),
        prose(str(row["shape"])),
        prose(str(row["dtype"])),
        str(row["level"]),
        f"{_short(row.get('max_error_ratio'))}, {_short(row.get('mean_error_ratio'))}",
        _short(row.get("reference_us"), 4),
        _short(row.get("candidate_us"), 4),
        _short(row.get("forward_us"), 4),
        ratio,
        _short(row.get("tb_per_s")),
        _short(row.get("tflop_per_s")),
        *(f"{100 * row[of]:.0f} %" if timed and row.get(of) is not None else NOTHING for of in ("of_ceiling", "of_copies")),
    )


def _short(value: Any, digits: int = 3) -> str:
    return number(value, digits) if isinstance(value, int | float) else NOTHING if value is None else prose(str(value))
