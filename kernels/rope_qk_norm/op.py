"""The two sides as functions of one input tuple, for the op check and the microbenchmark."""

from __future__ import annotations

import torch

from kernels.contract import Op, Workload

from .reference import EPS, rope_qk_norm_reference

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, bool]


def rope_op(*workloads: Workload) -> Op:
    """T positions of H query and KV key heads of D, R of them rotated; gated: the query beside a gate; trained or not."""
    return Op(_reference, _candidate, _inputs, workloads, _bytes_moved, _flops)


def _reference(
    query: torch.Tensor,
    key: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    zero_centred: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return rope_qk_norm_reference(query, key, q_weight, k_weight, cos, sin, EPS, zero_centred)


def _candidate(
    query: torch.Tensor,
    key: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    zero_centred: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    from .kernel import rope_qk_norm

    return rope_qk_norm(query, key, q_weight, k_weight, cos, sin, EPS, zero_centred)


def _inputs(workload: Workload, device: torch.device, seed: int) -> Inputs:
    """query [1, T, H, D], with gated: 1 a half of wider rows, key [1, T, KV, D], weights around 0 or 1, the angles' cos and
    sin at positions 0 to T. Rows differ much in size."""
    T, H, KV, D, R = (workload.shape[key] for key in ("T", "H", "KV", "D", "R"))
    zero_centred, trained, gated = (bool(workload.shape[key]) for key in ("zero_centred", "trained", "gated"))
    dtype, generator = getattr(torch, workload.dtype), torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    def heads(count: int, width: int) -> torch.Tensor:
        return (normal(1, T, count, 1).exp() * normal(1, T, count, width)).to(dtype)

    query = heads(H, 2 * D)[..., :D] if gated else heads(H, D)
    weights = [(0.2 * normal(D) + (not zero_centred)).to(dtype).requires_grad_(trained) for _ in range(2)]
    frequencies = 1e4 ** -(torch.arange(0, R, 2, device=device) / R)
    angles = (torch.arange(T, device=device)[:, None] * frequencies).repeat(1, 2)[None]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return query.requires_grad_(), heads(KV, D).requires_grad_(), *weights, cos, sin, zero_centred


def _bytes_moved(workload: Workload) -> int:
    """Forward reads query and key and writes both; backward reads both and their gradients and writes two. cos, sin and
    weights are read twice, trained weights' gradients written; the norms' factors, fp32, are written and read."""
    T, H, KV, D, R, trained = (workload.shape[key] for key in ("T", "H", "KV", "D", "R", "trained"))
    item = getattr(torch, workload.dtype).itemsize
    return item * (5 * T * (H + KV) * D + 4 * T * R + (6 if trained else 4) * D) + 2 * 4 * T * (H + KV)


def _flops(workload: Workload) -> int:
    """An element: forward 4 (square, sum, two products), backward 9; one that is rotated 3 more each way; of dw 2."""
    T, H, KV, D, R, trained = (workload.shape[key] for key in ("T", "H", "KV", "D", "R", "trained"))
    return T * (H + KV) * (D * (13 + 2 * trained) + 6 * R)
