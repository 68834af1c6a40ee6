"""`python -m bench.cross_compile`: what every kernel compiles to for GPUs that are not here, beside what its folder expects.

Ends with 0 when all is as expected, 1 when something is not or a Triton kernel has no case, 2 for a mistake.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loop.cli import guarded, parse
from loop.errors import UserError

if TYPE_CHECKING:
    from bench.cross_compile.records import Outcome


@dataclass(frozen=True)
class Command:
    """Flags of `python -m bench.cross_compile`."""

    optimization: tuple[str, ...] = ()  # compile only these folders' kernels, and write nothing; none: all, and the report
    reports: Path = Path("reports")  # the folder of reports; its folder `data` holds the record


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, or 1 where something is not as expected. Raises UserError for what the user must put right."""
    command = parse(Command(), "python -m bench.cross_compile", "Cross-compiles every kernel and says what came out.", argv)
    from bench.cross_compile.folders import declaring, uncovered
    from bench.cross_compile.run import compile_cases

    known = declaring()
    for name in command.optimization:
        if name not in known:
            raise UserError(f"--optimization: no folder {name!r} with a cross_compile.py; there are: {', '.join(known)}")
    outcomes = compile_cases(command.optimization)
    wrong = [f"{_label(outcome)}: {fault}" for outcome in outcomes for fault in outcome.faults]
    wrong += uncovered(outcomes, command.optimization)
    if not command.optimization:
        _publish(outcomes, command.reports)
    for line in wrong:
        print(line, file=sys.stderr)
    print(_summary(outcomes))
    return 1 if wrong else 0


def _publish(outcomes: Sequence[Outcome], reports: Path) -> None:
    import torch

    from abtest.environment import describe
    from bench.cross_compile.records import write
    from bench.report import render

    here = describe(torch.device("cpu"))
    commit = {name: here[name] for name in ("git_sha", "git_dirty")}
    try:
        write(reports / "data", [dataclasses.replace(outcome, **commit) for outcome in outcomes])
        render(reports / "data", reports)
    except OSError as error:
        raise UserError(f"{error.filename or reports}: {error.strerror or error}") from error
    print(f"written: {reports / 'cross_compile' / 'README.md'}")


def _summary(outcomes: Sequence[Outcome]) -> str:
    passed, skipped = sum(outcome.passed for outcome in outcomes), sum(outcome.skipped is not None for outcome in outcomes)
    tail = f", {skipped} not compiled here" if skipped else ""
    return f"{passed} of {len(outcomes)} compile to what their folders expect{tail}"


def _label(outcome: Outcome) -> str:
    return f"{outcome.optimization} ({outcome.case}) for {outcome.target}"


if __name__ == "__main__":
    guarded(main)
