"""Puts the gathering loss head in place of the loop's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .kernel import supervised_cross_entropy
from .reference import cross_entropy_head

if TYPE_CHECKING:
    from loop.run import Run


def eligible(run: Run) -> str | None:
    """None, or why not: another optimization has put its own loss head into the run."""
    if run.loss_head is not cross_entropy_head:
        return "another optimization already owns the loss head"
    return None


def apply(run: Run) -> None:
    run.loss_head = supervised_cross_entropy
