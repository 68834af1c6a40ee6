"""Swaps every gated SiLU MLP of a transformers model for one that calls the fused kernel."""

from __future__ import annotations

import copy
import inspect

import torch
from torch import nn

from kernels.contract import Needs
from kernels.registry import unmet
from kernels.swapping import is_watched
from loop.run import Run

from .reference import silu_mul_reference

CHILDREN = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class FusedMLP(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)) for x [..., D], on the submodules of the MLP that it replaces.

    The projections may be nn.Linear or anything that wraps one (LoRA); parameters keep their identity, names and order.
    """

    def __init__(self, mlp: nn.Module):
        super().__init__()
        for name, child in mlp.named_children():
            self.add_module(name, child)
        self.training = mlp.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from .kernel import silu_mul

        return self.down_proj(silu_mul(self.gate_proj(x), self.up_proj(x)))


class _Constant(nn.Module):
    """Stands for a projection in a probe: returns the same values for any input."""

    def __init__(self, value: torch.Tensor):
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value


def is_gated_silu_mlp(module: nn.Module) -> bool:
    """Whether `module` computes exactly down_proj(silu(gate_proj(x)) * up_proj(x)).

    The structure must be right (those three children and `act_fn`, nothing of its own, no hooks that a swap would lose),
    and so must the behaviour: the forward is run with known values in place of the projections, which tells apart a
    model that multiplies by a constant on the way (FalconH1) or has another activation (Gemma).
    """
    if {name for name, _ in module.named_children()} != CHILDREN or isinstance(module, FusedMLP):
        return False
    if any((*module.parameters(recurse=False), *module.buffers(recurse=False))):
        return False
    if len(inspect.signature(type(module).forward).parameters) != 2 or is_watched(module):
        return False
    gate, up = torch.linspace(-6.0, 6.0, 16, device="cpu"), torch.linspace(3.0, -2.0, 16, device="cpu")
    probe = copy.copy(module)
    stand_ins = {"gate_proj": _Constant(gate), "up_proj": _Constant(up), "down_proj": nn.Identity()}
    probe.__dict__["_modules"] = {**module._modules, **stand_ins}
    with torch.no_grad():
        return torch.equal(probe(torch.zeros(16, device="cpu")), silu_mul_reference(gate, up))


def gated_mlps(model: nn.Module) -> list[str]:
    """Names of the modules inside `model` that `apply` swaps, in the model's order."""
    return [name for name, module in model.named_modules() if name and is_gated_silu_mlp(module)]


def eligible(run: Run) -> str | None:
    """None, or why this run can't have the fused MLP: no Triton, nowhere for it to run, or no MLP of this form."""
    reason = unmet(Needs(triton=True), run.device)
    if reason:
        return reason
    if not gated_mlps(run.model):
        return f"{type(run.model).__name__} has no MLP of the form down_proj(silu(gate_proj(x)) * up_proj(x))"
    return None


def apply(run: Run) -> None:
    """Replaces every such MLP of `run.model`. Raises ValueError when there is none."""
    names = gated_mlps(run.model)
    if not names:
        raise ValueError(f"{type(run.model).__name__} has no gated SiLU MLP to replace")
    for name in names:
        run.model.set_submodule(name, FusedMLP(run.model.get_submodule(name)))
