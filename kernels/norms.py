"""What the folders that put a kernel in the place of norms ask alike: of a run, and of the modules that they replace."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from kernels.contract import Needs
from kernels.registry import unmet
from kernels.swapping import is_watched

if TYPE_CHECKING:
    from loop.run import Run

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # that each of these kernels takes
EPS_NAMES = ("eps", "variance_epsilon")


def no_kernel_for(found: Collection[str], what: str, run: Run) -> str | None:
    """None, or why `run` can't have the kernel whatever its modules `found` are like: there is no Triton, its model has none
    of them (`what` says in words what they are), or it computes in a dtype that no kernel here takes."""
    reason = unmet(Needs(triton=True), run.device)
    if reason:
        return reason
    if not found:
        return f"{type(run.model).__name__} has no {what}"
    if run.dtype not in DTYPES:
        return f"the run computes in {run.dtype}; the kernel takes {', '.join(map(str, DTYPES))}"
    return None


def of_another_dtype(weights: Mapping[str, torch.Tensor], run: Run) -> str | None:
    """None, or the first of `weights`, by name, that is not in the dtype in which `run` computes."""
    for name, weight in weights.items():
        if weight.dtype != run.dtype:
            return f"{name} is {weight.dtype}, but the run computes in {run.dtype}; the kernel takes one dtype"
    return None


def is_one_weight(norm: nn.Module) -> bool:
    """Whether `norm` holds a parameter named weight and nothing else: no hooks and no forward that a swap would lose."""
    return set(norm._parameters) == {"weight"} and not norm._buffers and not norm._modules and not is_watched(norm)


def epsilon(norm: nn.Module) -> float | None:
    """What a norm adds to the mean of squares: models have two names for it."""
    found = [value for name in EPS_NAMES if isinstance(value := getattr(norm, name, None), float)]
    return found[0] if found else None
