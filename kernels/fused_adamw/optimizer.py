"""The loop's optimizer with another way through its update."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from loop.optim import MasterAdamW, learning_rate

from .kernel import Moved, Settings, update


class FusedMasterAdamW:
    """Stands where a `MasterAdamW` stood, and is that optimizer in all but `step`: masters, moments, hooks and checkpoints
    are the one's that it was made from, so whoever holds that one, or a state that it saved, need not know.
    """

    def __init__(self, inner: MasterAdamW) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        """Asked for what is not here: all that is the other's."""
        if name == "inner":  # a copy in the making has none yet
            raise AttributeError(name)
        return getattr(self.inner, name)

    @torch.no_grad()
    def step(self, step: int) -> tuple[float, Tensor]:
        """One update from the accumulated gradients, which it clears. Returns the rate and the norm before clipping."""
        rate = learning_rate(self.config, step, self.steps)
        limit = self.config.clip_norm if self.config.clip_norm > 0 else math.inf
        norm = torch.nn.utils.get_total_norm([master.grad for master in self.masters.values() if master.grad is not None])
        clip = torch.clamp(limit / (norm + 1e-6), max=1.0)  # as clip_grad_norm_ has it; norms of inf and NaN with it
        for group in self.adamw.param_groups:
            group["lr"] = rate
            beta1, beta2 = group["betas"]
            settings = Settings(rate, rate * group["weight_decay"], beta1, beta2, group["eps"])
            update(self._moved(master for master in group["params"] if master.grad is not None), clip, settings)
        self.publish()
        self.zero_grad()
        return rate, norm

    def _moved(self, masters: Iterable[Tensor]) -> list[Moved]:
        """Everything that an update of `masters` touches, counted one step further."""
        owned = [(master, self.inner.moments(master)) for master in masters]
        if not owned:
            return []
        steps = [own["step"] for _, own in owned]
        torch._foreach_add_(steps, 1)
        counts = torch.stack(steps).tolist()
        return [
            Moved(master, _laid_out_as(master), own["exp_avg"], own["exp_avg_sq"], count)
            for (master, own), count in zip(owned, counts, strict=True)
        ]


def _laid_out_as(master: Tensor) -> Tensor:
    """Its gradient with its strides; autograd leaves dimensions of one element with others."""
    gradient = master.grad
    return gradient if gradient.stride() == master.stride() else torch.empty_like(master).copy_(gradient)
