"""The reference: what a gated MLP computes up to its down projection, as two products and two elementwise operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.contract import Workload


def swiglu(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    """x [T, D], gate_weight and up_weight [I, D] -> silu(x gate_weight^T) * (x up_weight^T), [T, I]."""
    return F.silu(F.linear(x, gate_weight)) * F.linear(x, up_weight)


def inputs(workload: Workload, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x and both weights, all with gradients."""
    T, D, I = (workload.shape[key] for key in "TDI")
    dtype, generator = getattr(torch, workload.dtype), torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype).requires_grad_()

    return draw(T, D, scale=2.0), draw(I, D, scale=D**-0.5), draw(I, D, scale=D**-0.5)


def bytes_moved(workload: Workload) -> int:
    """Forward reads x and both weights and writes y; backward reads dy, x and both weights and writes dx and two weight
    gradients; gate and up count as nothing, since a backward could compute them again."""
    T, D, I = (workload.shape[key] for key in "TDI")
    return getattr(torch, workload.dtype).itemsize * (3 * T * D + 6 * I * D + 2 * T * I)


def flops(workload: Workload) -> int:
    """Two products forward, four backward, and 17 elementwise operations a value of y."""
    T, D, I = (workload.shape[key] for key in "TDI")
    return 12 * T * D * I + 17 * T * I
