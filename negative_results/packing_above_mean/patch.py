"""Puts the micro-step that joins packs where the loop's was."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loop.model import plain_micro_step

from .kernel import joined_micro_step

if TYPE_CHECKING:
    from loop.run import Run


def eligible(run: Run) -> str | None:
    """None, or why not: nothing to join, or another micro-step than the loop's."""
    packs = run.config.data.packs_per_micro_step
    if packs < 2:
        return f"a micro-step has {packs} pack and nothing to join; --data.packs-per-micro-step 2 or more gives it something"
    if run.micro_step is not plain_micro_step:
        return "another optimization, or padding, already owns the micro-step"
    return None


def apply(run: Run) -> None:
    run.micro_step = joined_micro_step
