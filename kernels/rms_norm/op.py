"""The two sides as functions of one input tuple, for the op check and the microbenchmark."""

from __future__ import annotations

import torch

from kernels.contract import Op, Workload

from .reference import EPS, norm_reference


def norm_op(*workloads: Workload) -> Op:
    """T rows of D; zero_centred: times 1 + weight; add: behind a residual addition; trained: else frozen."""
    return Op(norm_reference, _candidate, _inputs, workloads, _bytes_moved, _flops)


def _candidate(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, zero_centred: bool
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    from .kernel import add_rms_norm, rms_norm

    if residual is None:
        return rms_norm(x, weight, EPS, zero_centred)
    return add_rms_norm(x, residual, weight, EPS, zero_centred)


def _inputs(
    workload: Workload, device: torch.device, seed: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, bool]:
    """x [T, D], residual [T, D] or None, weight [D] around 0 or 1, zero_centred. Rows differ much in size."""
    shape, dtype, generator = workload.shape, getattr(torch, workload.dtype), torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    T, D, zero_centred = shape["T"], shape["D"], bool(shape["zero_centred"])
    size = normal(T, 1).exp()
    x = (size * normal(T, D)).to(dtype).requires_grad_()
    residual = (size * normal(T, D)).to(dtype).requires_grad_() if shape["add"] else None
    weight = (0.2 * normal(D) + (0.0 if zero_centred else 1.0)).to(dtype).requires_grad_(bool(shape["trained"]))
    return x, residual, weight, zero_centred


def _bytes_moved(workload: Workload) -> int:
    """Forward reads x and writes y; backward reads dy and x and writes dx. An addition has the residual to read and the sum
    to write forward, and the sum's gradient to read backward. rstd is fp32, written once and read once."""
    T, D, add, trained = (workload.shape[key] for key in ("T", "D", "add", "trained"))
    item = getattr(torch, workload.dtype).itemsize
    return item * ((8 if add else 5) * T * D + (3 if trained else 2) * D) + 2 * 4 * T


def _flops(workload: Workload) -> int:
    """Forward 4 an element (square, sum, two products); backward 9; the addition 1 each way; the weight's gradient 2."""
    T, D, add, trained = (workload.shape[key] for key in ("T", "D", "add", "trained"))
    return T * D * (13 + 2 * add + 2 * trained)
