"""A micro-step as tests of swapped modules compare it: before the swap and after."""

from __future__ import annotations

from torch import Tensor

from loop.batch import PackedBatch
from loop.run import Run


def step(run: Run, batch: PackedBatch) -> dict[str, Tensor]:
    """Loss and gradients of one micro-step, by name."""
    run.optimizer.zero_grad()
    loss = run.micro_step(run, batch, batch.supervised_tokens)
    return {"loss": loss} | {name: value.clone() for name, value in run.optimizer.gradients().items()}
