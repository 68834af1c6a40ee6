"""A progress bar on stderr: which arm, which phase and step, and what is left."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class GateProgress:
    """On a terminal a live bar; elsewhere (a log, CI) one line when an arm enters a phase.

    `planned`: the units of work of the whole run, one a step, which the remaining time is estimated from.
    """

    def __init__(self, planned: int) -> None:
        console = Console(stderr=True)
        self.live = console.is_terminal
        columns = (
            TextColumn("[bold]{task.fields[arm]}[/] {task.fields[phase]}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        self.progress = Progress(*columns, console=console, disable=not self.live)
        self.task = self.progress.add_task("work", total=planned, arm="starting", phase="")
        self.planned, self.done, self.said = planned, 0, set()
        self.began = time.monotonic()

    def __enter__(self) -> GateProgress:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def __call__(self, arm: str, phase: str, done: int, total: int) -> None:
        """One more unit of work is done: step `done` of `total` of `phase` in `arm`."""
        self.done += 1
        if not self.live and (arm, phase) not in self.said:  # arms may take turns
            share, seconds = 100 * self.done // max(self.planned, 1), time.monotonic() - self.began
            print(f"[{share:3d} %, {seconds:4.0f} s] {arm}: {phase} ({total} steps)", file=sys.stderr, flush=True)
        self.said.add((arm, phase))
        self.progress.update(self.task, completed=self.done, arm=arm, phase=f"{phase}, step {done}/{total}")

    def skip(self, units: int) -> None:
        """Work that turned out not to be needed."""
        self.planned -= units
        self.progress.update(self.task, total=self.planned)

    def say(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self.live:
            self.progress.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)
