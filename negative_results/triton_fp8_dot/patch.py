"""Swaps the decoder's projections; adapters, which are skinny, and the head, whose errors go right into the loss, stay."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from kernels.contract import Needs
from kernels.registry import unmet
from kernels.swapping import is_watched

if TYPE_CHECKING:
    from loop.run import Run

ADAPTERS = ("lora_A", "lora_B")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def eligible(run: Run) -> str | None:
    """None, or why not: no Triton, a dtype that the kernel has no result in, or no plain projection."""
    reason = unmet(Needs(triton=True), run.device)
    if reason:
        return reason
    if run.dtype not in DTYPES:
        return f"the run computes in {run.dtype}; the kernel gives {', '.join(map(str, DTYPES))}"
    if not projections(run.model):
        return f"{type(run.model).__name__} has no plain nn.Linear besides its head and its adapters"
    return None


def apply(run: Run) -> None:
    """Replaces them. Parameters stay the same objects."""
    from .kernel import Fp8Linear

    for name in projections(run.model):
        run.model.set_submodule(name, Fp8Linear(run.model.get_submodule(name)))


def projections(model: nn.Module) -> list[str]:
    """Names of the layers that `apply` swaps, in the model's order: nn.Linear itself, whose calls nothing watches."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = []
    for name, module in model.named_modules():
        plain = name and type(module) is nn.Linear and module is not head and not is_watched(module)
        if plain and not any(part in ADAPTERS for part in name.split(".")):
            found.append(name)
    return found
