"""Puts the packed micro-step where a run has the padded one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loop.model import plain_micro_step
from loop.rows import padded_micro_step

if TYPE_CHECKING:
    from loop.run import Run


def eligible(run: Run) -> str | None:
    """None, or why not: rows that are packed already, or another micro-step than the loop's."""
    if run.micro_step is plain_micro_step:
        return "rows are packed already; --data.rows padded makes a run of padded ones"
    if run.micro_step is not padded_micro_step:
        return "another optimization already owns the micro-step"
    return None


def apply(run: Run) -> None:
    run.micro_step = plain_micro_step
