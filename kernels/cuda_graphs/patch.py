"""Puts the graphed micro-step in place of the loop's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loop.model import plain_micro_step

if TYPE_CHECKING:
    from loop.run import Run


def eligible(run: Run) -> str | None:
    """None, or why not: another micro-step than the loop's, or an optimizer that shows no masters to hold gradients."""
    if run.micro_step is not plain_micro_step:
        return "another optimization already owns the micro-step"
    if not hasattr(run.optimizer, "masters"):
        return f"{type(run.optimizer).__name__} has no masters, whose gradients a graph could add up"
    return None


def apply(run: Run) -> None:
    """Nothing is captured yet: what other optimizations still change is captured with the first micro-step."""
    from .micro_step import GraphedMicroStep
    from .recorder import CudaRecorder

    run.micro_step = GraphedMicroStep(CudaRecorder(run.device))
