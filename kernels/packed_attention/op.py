"""Both attentions as functions of one input tuple, for the op check and the microbenchmark."""

from __future__ import annotations

import torch

from kernels.contract import Op, Workload
from loop.delta_net import Pack

from .kernel import attend_within_documents
from .reference import layer_of, masked_attention

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, Pack, int | None]


def attention_op(*cases: tuple[Workload, tuple[int, ...]]) -> Op:
    """cases: workload and its document lengths, B * L in all. H heads, KV of key and value, D wide, W: sliding window."""
    lengths = {workload.name: documents for workload, documents in cases}

    def inputs(workload: Workload, device: torch.device, seed: int) -> Inputs:
        """query [B, H, L, D], key and value [B, KV, L, D], all with gradients; the pack; the window or None."""
        shape, dtype = workload.shape, getattr(torch, workload.dtype)
        generator = torch.Generator(device).manual_seed(seed)

        def draw(heads: int) -> torch.Tensor:
            x = torch.randn(shape["B"], heads, shape["L"], shape["D"], generator=generator, device=device)
            return x.to(dtype).requires_grad_()

        pack = pack_of(lengths[workload.name], device)
        return draw(shape["H"]), draw(shape["KV"]), draw(shape["KV"]), pack, shape.get("W")

    def flops(workload: Workload) -> int:
        """Two products a visible score forward, five backward: the scores again, and dV, dP, dQ, dK."""
        seen = sum(_scores(length, workload.shape.get("W")) for length in lengths[workload.name])
        return 7 * 2 * seen * workload.shape["H"] * workload.shape["D"]

    return Op(masked_attention, _candidate, inputs, tuple(workload for workload, _ in cases), _bytes_moved, flops)


def pack_of(lengths: tuple[int, ...], device: torch.device) -> Pack:
    """A pack of documents of these lengths, in this order."""
    ends = torch.tensor((0, *lengths)).cumsum(0)
    return Pack(ends.to(device, torch.int32), lengths)


def _candidate(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: Pack, window: int | None = None
) -> torch.Tensor:
    return attend_within_documents(layer_of(query, key), query, key, value, None, pack=pack, sliding_window=window)[0]


def _scores(length: int, window: int | None) -> int:
    """How many pairs of positions see one another in a causal document."""
    hidden = max(length - window, 0) if window else 0
    return (length * (length + 1) - hidden * (hidden + 1)) // 2


def _bytes_moved(workload: Workload) -> int:
    """Forward reads q, k, v and writes y; backward reads those and dy and writes dq, dk, dv."""
    B, L, H, KV, D = (workload.shape[key] for key in ("B", "L", "H", "KV", "D"))
    return B * L * D * (5 * H + 6 * KV) * getattr(torch, workload.dtype).itemsize
