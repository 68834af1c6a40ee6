"""The page on what every kernel compiles to for GPUs that need not be here, from reports/data/cross_compile alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from bench.cross_compile import records
from bench.cross_compile.records import Outcome
from bench.report.text import MARK, NOTHING, code, prose, table
from kernels.cross_compile import TARGETS

PAGE = Path("cross_compile") / "README.md"
SHOWS = (
    "What this shows: each kernel compiles for GPUs of these kinds, and to what, read from its PTX and its machine code. "
    "It shows nothing about speed, and nothing about results: no kernel was run for it."
)
LEGEND = """\
- In parentheses: the most that the folder's `cross_compile.py` allows; of shared memory, never more than the target has.
- **spills**: bytes of stack and local memory a thread. **shared memory**: bytes a block, as the case would be launched.
- **16-byte accesses**: loads and stores of global memory in the PTX that move 16 bytes a thread or more, of all; in \
parentheses how many may be narrower.
- **instructions asked for**: lines of PTX, or of SASS where it says so, that hold the instruction; in parentheses how many \
must."""


def files(data_dir: Path) -> dict[Path, bytes]:
    """The page, relative to the folder of reports, and its bytes; empty where there is no record."""
    outcomes = records.load(data_dir)
    return {PAGE: page(outcomes).encode("utf-8", "replace")} if outcomes else {}


def page(outcomes: Sequence[Outcome]) -> str:
    """Markdown of `reports/cross_compile/README.md`. `outcomes` in the record's order, at least one."""
    groups = [(name, list(group)) for name, group in groupby(outcomes, key=lambda outcome: outcome.optimization)]
    dirty = any(outcome.git_dirty for outcome in outcomes)
    sections = [
        f"<!-- {MARK} -->\n# What the kernels compile to",
        _headline(outcomes),
        SHOWS,
        "**Compiled from a working tree with uncommitted changes.**" if dirty else "",
        _overview(groups),
        LEGEND,
        *(f"## {prose(name)}\n\n{_details(group)}" for name, group in groups),
        "## Where it comes from\n\n" + _provenance(outcomes),
        "[All reports](../README.md)",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _headline(outcomes: Sequence[Outcome]) -> str:
    passed, skipped = sum(outcome.passed for outcome in outcomes), sum(outcome.skipped is not None for outcome in outcomes)
    failed = [outcome for outcome in outcomes if outcome.faults]
    lines = [f"> **{passed} of {len(outcomes)} compile to what their folders expect.**"]
    if skipped:
        lines.append(f"> {skipped} were not compiled here.")
    for outcome in failed:
        where = f"{code(outcome.optimization)}, {prose(outcome.case)}, {prose(outcome.target)}"
        lines.append(f"> {where}: {prose('; '.join(outcome.faults))}.")
    return "\n>\n".join(lines)


def _overview(groups: Sequence[tuple[str, list[Outcome]]]) -> str:
    header = ("optimization", "kernels", "cases", "targets", "as expected", "most registers", "most shared memory")
    rows = []
    for name, group in groups:
        made = [outcome.measured for outcome in group if outcome.measured is not None]
        passed = sum(outcome.passed for outcome in group)
        rows.append((
            code(name), str(len({outcome.kernel for outcome in group})), str(len({outcome.case for outcome in group})),
            str(len({outcome.target for outcome in group})),
            f"{passed} of {len(group)}" if passed == len(group) else f"**{passed} of {len(group)}**",
            str(max(measured["registers"] for measured in made)) if made else NOTHING,
            f"{max(measured['shared_bytes'] for measured in made):,} B" if made else NOTHING,
        ))  # fmt: skip
    return table(header, rows, numeric=(1, 2, 3, 4, 5, 6))


def _details(group: Sequence[Outcome]) -> str:
    header = (
        "kernel", "case", "target", "registers", "spills", "shared memory", "16-byte accesses", "instructions asked for",
        "verdict",
    )  # fmt: skip
    launches = {outcome.case: outcome.launch for outcome in group}
    compiled_for = [
        f"- {prose(case)}: " + ", ".join(code(f"{name}: {value}") for name, value in launch.items() if value)
        for case, launch in launches.items()
    ]
    rows = [_row(outcome) for outcome in group]
    return table(header, rows, numeric=(3, 4, 5, 6)) + "\n\nCompiled for:\n\n" + "\n".join(compiled_for)


def _row(outcome: Outcome) -> tuple[str, ...]:
    name = (code(outcome.kernel.rpartition(".")[2]), prose(outcome.case), prose(outcome.target))
    if outcome.measured is None:
        verdict = f"not compiled: {prose(outcome.skipped)}" if outcome.skipped is not None else _verdict(outcome)
        return (*name, *[NOTHING] * 5, verdict)
    measured, limits = outcome.measured, outcome.limits
    wide = measured["accesses"] - measured["narrow_accesses"]
    return (
        *name,
        _limited(measured["registers"], limits["registers"]),
        _limited(measured["spill_bytes"], limits["spill_bytes"]),
        _limited(measured["shared_bytes"], limits["shared_bytes"]),
        _limited(f"{wide} of {measured['accesses']}", limits["narrow_accesses"]),
        _instructions(outcome),
        _verdict(outcome),
    )


def _limited(value: int | str, limit: int | None) -> str:
    shown = f"{value:,}" if isinstance(value, int) else value
    return shown if limit is None else f"{shown} ({limit:,})"


def _instructions(outcome: Outcome) -> str:
    cells = []
    for count in outcome.instructions:
        where = " in SASS" if count.code == "sass" else ""
        cells.append(f"{code(count.name)}{where} {count.found} ({count.allowed})")
    return "<br>".join(cells) or NOTHING


def _verdict(outcome: Outcome) -> str:
    return "as expected" if outcome.passed else f"**{prose('; '.join(outcome.faults))}**"


def _provenance(outcomes: Sequence[Outcome]) -> str:
    """Which compiler made which targets' code, and of which commit."""
    used: dict[str, set[str]] = {}
    for outcome in outcomes:
        for name, version in outcome.compilers.items():
            used.setdefault(f"{name} {version}", set()).add(outcome.target)
    lines = []
    for compiler, targets in sorted(used.items()):
        lines.append(f"- {prose(compiler)}: {', '.join(target for target in TARGETS if target in targets)}")
    commits = sorted({outcome.git_sha or "unknown" for outcome in outcomes})
    lines.append(f"- commit {', '.join(code(commit) for commit in commits)}")
    return "\n".join(lines) + "\n\n```sh\npython -m bench.cross_compile\n```"
