"""The two sides as functions of one input tuple, for the op check and the microbenchmark."""

from __future__ import annotations

import torch

from kernels.contract import Op, Workload

from .reference import EPS, gated_rms_norm_reference


def gated_norm_op(*workloads: Workload) -> Op:
    """T rows of D, a row for every position and value head; trained: the weight, else frozen."""
    return Op(_reference, _candidate, _inputs, workloads, _bytes_moved, _flops)


def _reference(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return gated_rms_norm_reference(x, gate, weight, EPS)


def _candidate(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from .kernel import gated_rms_norm

    return gated_rms_norm(x, gate, weight, EPS)


def _inputs(workload: Workload, device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    """x [T, D] whose rows differ much in size, gate [T, D] wide enough for both ends of the sigmoid, weight [D] around 1."""
    T, D, trained = (workload.shape[key] for key in ("T", "D", "trained"))
    dtype, generator = getattr(torch, workload.dtype), torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    x = (normal(T, 1).exp() * normal(T, D)).to(dtype).requires_grad_()
    gate = (3.0 * normal(T, D)).to(dtype).requires_grad_()
    return x, gate, (1.0 + 0.2 * normal(D)).to(dtype).requires_grad_(bool(trained))


def _bytes_moved(workload: Workload) -> int:
    """Forward reads x and gate and writes y; backward reads dy, x and gate and writes dx and dgate. rstd is fp32, written
    once and read once."""
    T, D, trained = (workload.shape[key] for key in ("T", "D", "trained"))
    return getattr(torch, workload.dtype).itemsize * (8 * T * D + (3 if trained else 2) * D) + 2 * 4 * T


def _flops(workload: Workload) -> int:
    """An element: forward 10 (square, sum, three products, five for silu); backward 21; the weight's gradient 2."""
    T, D, trained = (workload.shape[key] for key in ("T", "D", "trained"))
    return T * D * (31 + 2 * trained)
