"""The reference: PyTorch's linear layer, whose product reads the weight as it lies."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.contract import Workload


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, D_in], weight [D_out, D_in], bias [D_out] or None -> [T, D_out]."""
    return F.linear(x, weight, bias)


def inputs(workload: Workload, device: torch.device, seed: int) -> tuple[Tensor | None, ...]:
    """x, weight and bias; x requires a gradient, the others where `trained`. No bias where `bias` is 0."""
    T, D, O, trained, bias = (workload.shape[key] for key in ("T", "D_in", "D_out", "trained", "bias"))
    dtype, generator = getattr(torch, workload.dtype), torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(device, dtype)

    weight = normal(O, D, scale=D**-0.5).requires_grad_(bool(trained))
    return normal(T, D).requires_grad_(), weight, normal(O).requires_grad_(bool(trained)) if bias else None


def bytes_moved(workload: Workload) -> int:
    """Forward reads x and the weight and writes y; backward reads dy and the weight and writes dx, and where the weight
    trains reads x and writes its gradient."""
    T, D, O, trained = (workload.shape[key] for key in ("T", "D_in", "D_out", "trained"))
    return getattr(torch, workload.dtype).itemsize * (2 * (T * D + D * O + T * O) + trained * (T * D + D * O))


def flops(workload: Workload) -> int:
    """y and dx, and the weight's gradient where it trains."""
    T, D, O, trained = (workload.shape[key] for key in ("T", "D_in", "D_out", "trained"))
    return (4 + 2 * trained) * T * D * O
