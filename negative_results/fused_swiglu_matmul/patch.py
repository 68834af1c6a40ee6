"""Swaps every gated SiLU MLP whose gate and up projections are plain linear layers."""

from __future__ import annotations

import torch
from torch import nn

from kernels.contract import Needs
from kernels.registry import unmet
from kernels.silu_mul.patch import gated_mlps
from kernels.swapping import is_watched
from loop.run import Run


class SwigluMLP(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)) for x [..., D], on the submodules of the MLP that it replaces."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        for name, child in mlp.named_children():
            self.add_module(name, child)
        self.training = mlp.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from .kernel import fused_swiglu

        return self.down_proj(fused_swiglu(x, self.gate_proj.weight, self.up_proj.weight))


def eligible(run: Run) -> str | None:
    """None, or why not: no Triton, no gated SiLU MLP, or projections that are more than a product with a weight."""
    reason = unmet(Needs(triton=True), run.device)
    if reason:
        return reason
    names = gated_mlps(run.model)
    if not names:
        return f"{type(run.model).__name__} has no MLP of the form down_proj(silu(gate_proj(x)) * up_proj(x))"
    for name in names:
        mlp = run.model.get_submodule(name)
        for part in ("gate_proj", "up_proj"):
            reason = _more_than_a_product(getattr(mlp, part))
            if reason:
                return f"{name}.{part} {reason}; the kernel has a place for two weights and nothing else"
    return None


def _more_than_a_product(linear: nn.Module) -> str | None:
    if type(linear) is not nn.Linear:
        return f"is a {type(linear).__module__}.{type(linear).__name__}, not a plain nn.Linear (LoRA on it, say)"
    if linear.bias is not None:
        return "has a bias"
    return "has hooks or a forward of its own, which would no longer be called" if is_watched(linear) else None


def apply(run: Run) -> None:
    for name in gated_mlps(run.model):
        run.model.set_submodule(name, SwigluMLP(run.model.get_submodule(name)))
