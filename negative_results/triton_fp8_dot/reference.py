"""The reference: PyTorch's linear layer in the compute dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.contract import Workload


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, D_in], weight [D_out, D_in] -> [T, D_out]."""
    return F.linear(x, weight)


def inputs(workload: Workload, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """x, with a gradient, and weight, with one where `trained`. Rows of very different size, as activations have."""
    T, D, O, trained = (workload.shape[key] for key in ("T", "D_in", "D_out", "trained"))
    dtype, generator = getattr(torch, workload.dtype), torch.Generator().manual_seed(seed)
    size = torch.exp(2.0 * torch.randn(T, 1, generator=generator))
    x = (torch.randn(T, D, generator=generator) * size).to(device, dtype).requires_grad_()
    weight = torch.randn(O, D, generator=generator) * D**-0.5
    return x, weight.to(device, dtype).requires_grad_(bool(trained))


def bytes_moved(workload: Workload) -> int:
    """Forward reads x and the weight and writes y; backward reads dy and the weight and writes dx, and where the weight
    trains reads x and writes its gradient."""
    T, D, O, trained = (workload.shape[key] for key in ("T", "D_in", "D_out", "trained"))
    return getattr(torch, workload.dtype).itemsize * (2 * (T * D + D * O + T * O) + trained * (T * D + D * O))


def flops(workload: Workload) -> int:
    """y and dx, and the weight's gradient where it trains."""
    T, D, O, trained = (workload.shape[key] for key in ("T", "D_in", "D_out", "trained"))
    return (4 + 2 * trained) * T * D * O
