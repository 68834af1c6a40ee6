"""The reference is the loop's masked attention over the packs of a micro-step as rows, and the inputs of both sides."""

from __future__ import annotations

import torch

from kernels.contract import Workload
from kernels.packed_attention.op import pack_of
from loop.delta_net import Pack

DOCUMENT = 256  # tokens of a document of the large cases, of which 20 make the joined row
_2B = {"H": 8, "KV": 2, "D": 256}
_SMALL = {"H": 4, "KV": 2, "D": 32}
_CASES: tuple[tuple[Workload, tuple[int, ...]], ...] = (
    *((Workload(f"2B, {B} packs into one", _2B | {"B": B, "L": 20 * DOCUMENT // B}), (DOCUMENT,) * 20) for B in (2, 4)),
    (Workload("small, two packs", _SMALL | {"B": 2, "L": 320}, "float32", small=True), (300, 1, 2, 17, 250, 60, 10)),
    (Workload("small, three packs", _SMALL | {"B": 3, "L": 192}, "float32", small=True), (192, 1, 2, 189, 100, 92)),
)
WORKLOADS = tuple(workload for workload, _ in _CASES)
LENGTHS = {workload.name: lengths for workload, lengths in _CASES}


def inputs(workload: Workload, device: torch.device, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Pack]:
    """query [B, H, L, D], key and value [B, KV, L, D], all with gradients, and the documents of all packs."""
    shape, dtype = workload.shape, getattr(torch, workload.dtype)
    generator = torch.Generator().manual_seed(seed)
    drawn = (
        torch.randn(shape["B"], shape[heads], shape["L"], shape["D"], generator=generator) for heads in ("H", "KV", "KV")
    )
    query, key, value = (x.to(device, dtype).requires_grad_() for x in drawn)
    return query, key, value, pack_of(LENGTHS[workload.name], device)


def flops(workload: Workload) -> int:
    """Two products a visible score forward, five backward; hidden ones need not be computed."""
    seen = sum(length * (length + 1) // 2 for length in LENGTHS[workload.name])
    return 7 * 2 * seen * workload.shape["H"] * workload.shape["D"]


def bytes_moved(workload: Workload) -> int:
    """Forward reads q, k, v and writes y; backward reads those and dy and writes dq, dk, dv."""
    B, L, H, KV, D = (workload.shape[key] for key in ("B", "L", "H", "KV", "D"))
    return B * L * D * (5 * H + 6 * KV) * getattr(torch, workload.dtype).itemsize
