"""The delta rule of one layer as functions of one input tuple, for the op check and the microbenchmark."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.contract import Op, Workload
from loop.delta_net import CHUNK, Pack

from .reference import delta_rule

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Pack]


def delta_rule_op(*cases: tuple[Workload, tuple[int, ...]]) -> Op:
    """cases: workload and its document lengths, T in all. HK key heads K wide, HV value heads V wide."""
    lengths = {workload.name: documents for workload, documents in cases}

    def inputs(workload: Workload, device: torch.device, seed: int) -> Inputs:
        """q, k, v, g and beta as a layer makes them: a decay per position from 1 to nearly 0, beta between 0 and 1."""
        T, HK, HV, K, V = (workload.shape[key] for key in ("T", "HK", "HV", "K", "V"))
        dtype, generator = getattr(torch, workload.dtype), torch.Generator(device).manual_seed(seed)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(1, T, *size, generator=generator, device=device)

        q, k, v = (x.to(dtype).requires_grad_() for x in (normal(HK, K), normal(HK, K), normal(HV, V)))
        g = (-F.softplus(normal(HV) - 2)).requires_grad_()
        beta = normal(HV).sigmoid().to(dtype).requires_grad_()
        documents = lengths[workload.name]
        ends = torch.tensor((0, *documents)).cumsum(0)
        return q, k, v, g, beta, Pack(ends.to(device, torch.int32), documents)

    workloads = tuple(workload for workload, _ in cases)
    # FLA hands the states and the inverse on between its kernels in bf16; PyTorch's code has fp32 from end to end.
    return Op(delta_rule, _candidate, inputs, workloads, _bytes_moved, _flops, backward_stable=True)


def _candidate(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, pack: Pack
) -> torch.Tensor:
    from .kernel import fla_delta_rule

    return fla_delta_rule(q, k, v, g, beta, pack)


def _flops(workload: Workload) -> int:
    """The recurrence in chunks of 64, three times: forward, and backward twice that.

    Forward, a head and chunk of C positions: three C x C x K products (k k^T, its inverse onto k, q k^T), two C x C x V
    (the inverse onto v, scores onto values), and three C x K x V with the state (read twice, written once).
    """
    T, HV, K, V = (workload.shape[key] for key in ("T", "HV", "K", "V"))
    return 3 * 2 * T * HV * (CHUNK * (3 * K + 2 * V) + 3 * K * V)


def _bytes_moved(workload: Workload) -> int:
    """Forward reads the five inputs and writes y; backward reads those and dy and writes five gradients. g is fp32."""
    T, HK, HV, K, V = (workload.shape[key] for key in ("T", "HK", "HV", "K", "V"))
    item = getattr(torch, workload.dtype).itemsize
    inputs = item * (2 * HK * K + HV * V + HV) + 4 * HV
    return T * (3 * inputs + 2 * item * HV * V)
