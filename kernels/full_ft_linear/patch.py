"""Swaps every linear layer and embedding that trains for one that adds to the main gradient itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from kernels.shared_input import groups
from kernels.swapping import is_watched
from loop.lora import adapters

from .embedding import MainGradEmbedding
from .kernel import MainGradLinear, SharedLinears

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
    """Replaces them, joins those of one input, and replaces embeddings likewise.

    Parameters stay the same objects; what is no plain layer stays as it is.
    """
    layers: dict[str, MainGradLinear] = {}
    for name in trained_linears(run):
        layers[name] = MainGradLinear(run.model.get_submodule(name), run.optimizer)
        run.model.set_submodule(name, layers[name])
    for names in groups(layers.items()):
        SharedLinears([layers[name] for name in names])
    for name in trained_embeddings(run):
        run.model.set_submodule(name, MainGradEmbedding(run.model.get_submodule(name), run.optimizer))


def trained_linears(run: Run) -> list[str]:
    """Names of the layers that `apply` swaps, in the model's order."""
    return [name for name, module in run.model.named_modules() if name and is_plain(module) and collects(run, module.weight)]


def trained_embeddings(run: Run) -> list[str]:
    """Names of the embeddings that `apply` swaps. Their hooks come along: with checkpointing transformers puts one there."""
    return [
        name for name, module in run.model.named_modules() if name and only_looks_up(module) and collects(run, module.weight)
    ]


def collects(run: Run, weight: nn.Parameter) -> bool:
    """Whether the weight trains, the optimizer says where its gradient is added up, and nobody else wants to see it."""
    if not hasattr(run.optimizer, "collector"):
        return False
    return weight.requires_grad and not weight._backward_hooks and run.optimizer.collector(weight) is not None


def is_plain(module: nn.Module) -> bool:
    """Whether `module` is an nn.Linear and no more, and nothing watches its calls."""
    return type(module) is nn.Linear and not is_watched(module)


def only_looks_up(module: nn.Module) -> bool:
    """Whether `module` is an nn.Embedding that neither scales its rows, nor its gradient, nor has a forward of its own."""
    if type(module) is not nn.Embedding or "forward" in vars(module):
        return False
    return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
