"""The two sides as functions of one input tuple, for the op check and the microbenchmark.

The main gradient is compared as the gradient of the fp32 master. An op may not write to its inputs, so the candidate adds to
a copy of the sum that came before; training adds in place and makes no copy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.contract import Op, Workload

from .kernel import weight_gradient
from .reference import stock_linear


def linear_op(*workloads: Workload) -> Op:
    """T rows, D_in and D_out features; held: 1 where earlier micro-steps have left a sum, 0 in the first."""
    return Op(stock_linear, main_grad_linear, _inputs, workloads, _bytes_moved, _flops)


def main_grad_linear(x: Tensor, weight: Tensor, master: Tensor, held: Tensor | None) -> Tensor:
    """As `stock_linear`, with the main gradient from `weight_gradient`."""
    return _Linear.apply(x, weight, master, held)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, master: Tensor, held: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.held = held
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, Tensor, None]:
        x, weight = ctx.saved_tensors
        return dy @ weight, None, weight_gradient(dy, x, None if ctx.held is None else ctx.held.clone()), None


def _inputs(workload: Workload, device: torch.device, seed: int) -> tuple[Tensor | None, ...]:
    """x and master, both with gradients, the weight that master rounds to, and what earlier micro-steps left."""
    T, D, O, held = (workload.shape[key] for key in ("T", "D_in", "D_out", "held"))
    dtype, generator = getattr(torch, workload.dtype), torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(device)

    weight = normal(O, D, scale=D**-0.5).to(dtype)
    x = normal(T, D).to(dtype).requires_grad_()
    return x, weight, weight.float().clone().requires_grad_(), normal(O, D, scale=T**0.5) if held else None


def _flops(workload: Workload) -> int:
    """Three products: y, dx and the weight's gradient."""
    return 6 * workload.shape["T"] * workload.shape["D_in"] * workload.shape["D_out"]


def _bytes_moved(workload: Workload) -> int:
    """Forward reads x and the weight and writes y; backward reads dy, x and the weight and writes dx and the fp32 sum, which
    it also reads where there is one."""
    T, D, O, held = (workload.shape[key] for key in ("T", "D_in", "D_out", "held"))
    item = getattr(torch, workload.dtype).itemsize
    return item * (3 * T * D + 2 * T * O + 2 * D * O) + 4 * (1 + held) * D * O
