"""Swaps every gated SiLU MLP for one that launches silu_mul's kernels with another number of warps."""

from __future__ import annotations

import torch
from torch import nn

from kernels.silu_mul.patch import eligible as eligible_for_silu_mul
from kernels.silu_mul.patch import gated_mlps
from loop.run import Run

WARPS = 8  # of a whole run: the next number up from silu_mul's, and the one that people set


class WarpsMLP(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)) for x [..., D], on the submodules of the MLP that it replaces."""

    def __init__(self, mlp: nn.Module, warps: int = WARPS):
        super().__init__()
        for name, child in mlp.named_children():
            self.add_module(name, child)
        self.warps = warps
        self.training = mlp.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from .kernel import silu_mul_with_warps

        return self.down_proj(silu_mul_with_warps(self.gate_proj(x), self.up_proj(x), self.warps))


def eligible(run: Run) -> str | None:
    """None, or why not; the reasons are those of silu_mul."""
    return eligible_for_silu_mul(run)


def apply(run: Run) -> None:
    for name in gated_mlps(run.model):
        run.model.set_submodule(name, WarpsMLP(run.model.get_submodule(name)))
