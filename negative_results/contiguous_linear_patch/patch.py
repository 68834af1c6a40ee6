"""Swaps every linear layer: what patching torch.nn.functional.linear would reach, without touching the library."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from kernels.swapping import is_watched

from .kernel import ContiguousLinear

if TYPE_CHECKING:
    from loop.run import Run


def eligible(run: Run) -> str | None:
    if not plain_linears(run.model):
        return f"{type(run.model).__name__} has no plain nn.Linear"
    return None


def apply(run: Run) -> None:
    """Replaces them, the adapters' own and the output head among them. Parameters stay the same objects."""
    for name in plain_linears(run.model):
        run.model.set_submodule(name, ContiguousLinear(run.model.get_submodule(name)))


def plain_linears(model: nn.Module) -> list[str]:
    """Names of the layers that `apply` swaps, in the model's order: nn.Linear itself, whose calls nothing watches."""
    return [name for name, module in model.named_modules() if name and type(module) is nn.Linear and not is_watched(module)]
