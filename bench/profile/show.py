"""A profile as tables on stderr."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from abtest import markdown
from bench.profile import groups
from bench.profile.memory import WORDS
from bench.profile.records import busy_share

NAMES = 15  # of kernels or operators


def show(result: dict[str, Any]) -> None:
    console = Console(stderr=True, highlight=False, width=140)
    phases = result["phases"]
    device = phases["step"]["busy_s"] is not None
    console.print(_walls(phases, device))
    console.print(_groups(phases))
    console.print(_names(phases["micro_step"]))
    if device:
        console.print(_gaps(phases["step"]))
    console.print(_memory(result["memory"]))
    console.print(_stacks(result["stacks"]), markup=False)


def _grid(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    grid = Table(title=title, title_justify="left")
    for name in left:
        grid.add_column(name)
    for name in right:
        grid.add_column(name, justify="right", no_wrap=True)
    return grid


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.3f}"


def _walls(phases: dict[str, Any], device: bool) -> Table:
    numbers = ("device busy ms", "busy", "kernels", "copies", "launches", "graphs") if device else ()
    grid = _grid("One of each, without the profiler", ("",), ("wall ms", "lowest, highest", *numbers))
    for name, phase in phases.items():
        cells = [ms(phase["wall_s"]), f"{ms(phase['wall_low_s'])}, {ms(phase['wall_high_s'])}"]
        if device:
            counts = (f"{phase[key]:,.1f}" for key in ("kernels", "copies", "launches", "graph_launches"))
            cells += [ms(phase["busy_s"]), f"{busy_share(phase):.1%}", *counts]
        grid.add_row(name.replace("_", "-"), *cells)
    return grid


def _groups(phases: dict[str, Any]) -> Table:
    found = phases["micro_step"]["groups"]
    grid = _grid("A micro-step by what it does", ("",), ("ms", "share"))
    for name, seconds in found.items():
        grid.add_row(groups.WORDS[name], ms(seconds), f"{seconds / (sum(found.values()) or 1):.1%}")
    return grid


def _names(phase: dict[str, Any]) -> Table:
    grid = _grid("What takes longest in a micro-step", ("", "group", "optimization"), ("ms", "times"))
    for row in phase["names"][:NAMES]:
        grid.add_row(row["name"], groups.WORDS[row["group"]], row["owner"] or "", ms(row["seconds"]), f"{row['count']:,.1f}")
    return grid


def _gaps(phase: dict[str, Any]) -> Table:
    grid = _grid("Longest gaps of a step, as the profiler saw them", ("the host was at",), ("at ms", "ms"))
    for gap in phase["gaps"]:
        grid.add_row(gap["host"], ms(gap["at_s"]), ms(gap["seconds"]))
    return grid


def _memory(sizes: dict[str, Any]) -> Table:
    grid = _grid(f"Memory by owner ({sizes['counted_by']})", ("",), ("",))
    for name, words in WORDS.items():
        grid.add_row(words, markdown.memory(sizes[name]))
    return grid


def _stacks(stacks: dict[str, Any]) -> str:
    if "missing" in stacks:
        return f"no host stacks: {stacks['missing']}"
    top = (f"  {samples / stacks['samples']:6.1%}  {frame}" for frame, samples in stacks["own"])
    return "\n".join(["Where the host's stacks end:", *top])
