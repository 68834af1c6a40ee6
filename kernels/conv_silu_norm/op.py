"""The two sides as functions of one input tuple, for the op check and the microbenchmark."""

from __future__ import annotations

import torch

from kernels.contract import Op, Workload
from loop.delta_net import Pack

from .reference import EPS, conv_silu_norm_reference

Inputs = tuple[torch.Tensor, torch.Tensor, Pack, int, int]


def mixer_op(*cases: tuple[Workload, tuple[int, ...]]) -> Op:
    """cases: workload and its document lengths, T in all. HK heads of q and k, K wide; V columns of v; trained or not."""
    lengths = {workload.name: documents for workload, documents in cases}

    def inputs(workload: Workload, device: torch.device, seed: int) -> Inputs:
        """x [1, T, C] as a projection gives it, weight [C, 4] of the size that PyTorch initialises, the pack, heads."""
        T, HK, K, V, trained = (workload.shape[key] for key in ("T", "HK", "K", "V", "trained"))
        dtype, generator = getattr(torch, workload.dtype), torch.Generator(device).manual_seed(seed)
        x = torch.randn(1, T, 2 * HK * K + V, generator=generator, device=device).to(dtype).requires_grad_()
        weight = torch.rand(2 * HK * K + V, 4, generator=generator, device=device) - 0.5
        documents = lengths[workload.name]
        ends = torch.tensor((0, *documents)).cumsum(0)
        pack = Pack(ends.to(device, torch.int32), documents)
        return x, weight.to(dtype).requires_grad_(bool(trained)), pack, HK, K

    def bytes_moved(workload: Workload) -> int:
        """Forward reads x and writes q, k and v; backward reads their gradients and x and writes dx; both read the weight
        and the boundaries, and a trained weight's gradient is written. The norms' factors, fp32, are written and read."""
        T, HK, K, V, trained = (workload.shape[key] for key in ("T", "HK", "K", "V", "trained"))
        C, item = 2 * HK * K + V, getattr(torch, workload.dtype).itemsize
        boundaries = 4 * (len(lengths[workload.name]) + 1)
        return item * (5 * T * C + (3 if trained else 2) * 4 * C) + 2 * (4 * T * 2 * HK + boundaries)

    return Op(conv_silu_norm_reference, _candidate, inputs, tuple(w for w, _ in cases), bytes_moved, _flops)


def _candidate(
    x: torch.Tensor, weight: torch.Tensor, pack: Pack, key_heads: int, key_width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from .kernel import conv_silu_norm

    return tuple(y[None] for y in conv_silu_norm(x.squeeze(0), weight, pack.starts, key_heads, key_width, EPS))


def _flops(workload: Workload) -> int:
    """An element: forward 12 (7 for four taps, 5 for SiLU), backward 24 (those again, 5 for SiLU's derivative and its use,
    7 for dx). One of q or k besides: forward 3 (square, sum, product), backward 6. The weight's gradient 8."""
    T, HK, K, V, trained = (workload.shape[key] for key in ("T", "HK", "K", "V", "trained"))
    return T * ((2 * HK * K + V) * (36 + 8 * trained) + 2 * HK * K * 9)
