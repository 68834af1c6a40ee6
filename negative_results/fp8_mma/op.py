"""The two sides as functions of one input tuple, for the op check and the microbenchmark."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernels.contract import Op, Workload

from .kernel import Fp8Linear


def linear_op(*workloads: Workload) -> Op:
    """T rows of D_in features through a frozen layer of D_out."""
    return Op(_reference, _candidate, _inputs, workloads, _bytes_moved, _flops)


def _reference(x: Tensor, linear: nn.Linear, _: Fp8Linear) -> Tensor:
    return linear(x)


def _candidate(x: Tensor, _: nn.Linear, quantised: Fp8Linear) -> Tensor:
    return quantised(x)


def _inputs(workload: Workload, device: torch.device, seed: int) -> tuple[Any, ...]:
    """x [T, D_in] that requires a gradient, a frozen nn.Linear, and the e4m3 layer over the same weight."""
    shape, dtype = workload.shape, getattr(torch, workload.dtype)
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(shape["D_in"], shape["D_out"], bias=False, device=device, dtype=dtype).requires_grad_(False)
    weight = torch.randn(linear.weight.shape, generator=generator) * shape["D_in"] ** -0.5
    linear.weight.copy_(weight)
    x = torch.randn(shape["T"], shape["D_in"], generator=generator).to(device, dtype)
    return x.requires_grad_(), linear, Fp8Linear(linear)


def _flops(workload: Workload) -> int:
    """The product forward, and dx."""
    T, D, O = (workload.shape[key] for key in ("T", "D_in", "D_out"))
    return 4 * T * D * O


def _bytes_moved(workload: Workload) -> int:
    """x and y forward, dy and dx backward, and a byte for each number of either layout of the weight."""
    T, D, O = (workload.shape[key] for key in ("T", "D_in", "D_out"))
    return 2 * T * (D + O) * getattr(torch, workload.dtype).itemsize + 2 * D * O
