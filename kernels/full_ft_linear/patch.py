"""Swaps every linear layer that trains for one that adds to the main gradient itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from kernels.swapping import is_watched
from loop.lora import adapters

from .kernel import MainGradLinear

if TYPE_CHECKING:
    from loop.run import Run


def eligible(run: Run) -> str | None:
    """None, or why not: adapters train instead of weights, an optimizer that takes gradients from autograd alone, or no
    plain nn.Linear that trains."""
    if any(adapters(run.model)):
        return "the run trains adapters; the weights of its linear layers are frozen"
    if not hasattr(run.optimizer, "collector"):
        return f"{type(run.optimizer).__name__} takes gradients from autograd alone"
    if not trained_linears(run):
        return f"{type(run.model).__name__} has no plain nn.Linear that trains"
    return None


def apply(run: Run) -> None:
    """Replaces them. Parameters stay the same objects; what is no plain layer stays as it is."""
    for name in trained_linears(run):
        parent, _, attribute = name.rpartition(".")
        layer = MainGradLinear(run.model.get_submodule(name), run.optimizer)
        setattr(run.model.get_submodule(parent), attribute, layer)


def trained_linears(run: Run) -> list[str]:
    """Names of the layers that `apply` swaps, in the model's order."""
    named = run.model.named_modules()
    return [name for name, m in named if name and is_plain(m) and run.optimizer.collector(m.weight) is not None]


def is_plain(module: nn.Module) -> bool:
    """Whether `module` is an nn.Linear that trains, and nothing watches its calls or its weight's gradient."""
    if type(module) is not nn.Linear or is_watched(module):
        return False
    return module.weight.requires_grad and not module.weight._backward_hooks
