"""Puts the fused update in the place of the loop's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from loop.optim import MasterAdamW

if TYPE_CHECKING:
    from loop.run import Run


def eligible(run: Run) -> str | None:
    """None, or why not: another optimizer than the loop's, or a master with holes between its elements."""
    if type(run.optimizer) is not MasterAdamW:
        return f"{type(run.optimizer).__name__} is not the loop's AdamW"
    for name, master in run.optimizer.masters.items():
        if torch.empty_like(master, device="meta").stride() != master.stride():
            return f"{name} does not lie densely in memory: its strides are {list(master.stride())}"
    return None


def apply(run: Run) -> None:
    from .optimizer import FusedMasterAdamW  # late: Triton may be missing where this is only asked

    run.optimizer = FusedMasterAdamW(run.optimizer)
