"""Clipping and AdamW of a list of tensors in one launch in Triton.

With g the clipped gradient, t the tensor's own step count and m, v the moments, as Loshchilov and Hutter have it:

    m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g g,
    master = (1 - rate decay) master - rate / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps).

All that depends on numbers alone is computed on the host in double and rounded once. That matters: in fp32, 0.999 is off by
1.3e-8, which is 1.3e-5 of the 0.001 that a kernel gets which subtracts it from 1.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512  # 4 warps x 4 elements a thread: one 16-byte load of each tensor
BLOCKS = 16  # of one tensor, at most, that one program updates
BLOCK_INTERPRETED = 1 << 14  # at most; the interpreter's cost is per program, not per element
WARPS = 4
COLUMNS = 5  # of the table of addresses


@dataclass(frozen=True)
class Settings:
    """What all tensors of a parameter group share; `decay` is the rate times the weight decay."""

    rate: float
    decay: float
    beta1: float
    beta2: float
    eps: float


class Moved(NamedTuple):
    """One tensor to update: fp32, all four of one shape, one device and the same dense strides. count: of its steps, with
    this one."""

    master: Tensor
    gradient: Tensor
    mean: Tensor
    square: Tensor
    count: float

    def row(self) -> tuple[int, ...]:
        """Its row in the table of addresses; its size comes last."""
        return (
            self.master.data_ptr(), self.gradient.data_ptr(), self.mean.data_ptr(), self.square.data_ptr(),
            self.master.numel(),
        )  # fmt: skip


@triton.jit
def _update_kernel(
    p_tensors, p_factors, p_chunks, p_clip, keep, beta1, rest1, beta2, rest2, eps,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    i_place = tl.program_id(0)
    i_tensor = tl.load(p_chunks + 2 * i_place)
    start = tl.load(p_chunks + 2 * i_place + 1).to(tl.int64) * (BLOCKS * BLOCK)
    p_row = p_tensors + COLUMNS * i_tensor
    p_master = tl.load(p_row).to(tl.pointer_type(tl.float32))
    p_gradient = tl.load(p_row + 1).to(tl.pointer_type(tl.float32))
    p_mean = tl.load(p_row + 2).to(tl.pointer_type(tl.float32))
    p_square = tl.load(p_row + 3).to(tl.pointer_type(tl.float32))
    size = tl.load(p_row + 4)
    if ALIGNED:  # addresses from a table say nothing of themselves
        p_master = tl.multiple_of(p_master, 16)
        p_gradient = tl.multiple_of(p_gradient, 16)
        p_mean = tl.multiple_of(p_mean, 16)
        p_square = tl.multiple_of(p_square, 16)
        size = tl.multiple_of(size, 16)
    rate = tl.load(p_factors + 2 * i_tensor)
    root = tl.load(p_factors + 2 * i_tensor + 1)
    clip = tl.load(p_clip)
    for first in range(0, tl.minimum(size - start, BLOCKS * BLOCK), BLOCK):
        o_block = start + first + tl.arange(0, BLOCK)
        m_block = o_block < size
        b_gradient = tl.load(p_gradient + o_block, mask=m_block, other=0.0) * clip
        b_mean = tl.load(p_mean + o_block, mask=m_block, other=0.0)
        b_square = tl.load(p_square + o_block, mask=m_block, other=0.0)
        b_master = tl.load(p_master + o_block, mask=m_block, other=0.0)
        b_mean = beta1 * b_mean + rest1 * b_gradient
        b_square = beta2 * b_square + rest2 * b_gradient * b_gradient
        b_denominator = tl.div_rn(tl.sqrt_rn(b_square), root) + eps
        b_master = keep * b_master - rate * tl.div_rn(b_mean, b_denominator)
        tl.store(p_mean + o_block, b_mean, mask=m_block)
        tl.store(p_square + o_block, b_square, mask=m_block)
        tl.store(p_master + o_block, b_master, mask=m_block)


def update(moved: Sequence[Moved], clip: Tensor, settings: Settings) -> None:
    """Clips and updates masters and moments in place; gradients stay as they are.

    clip: fp32 scalar on the tensors' device (CUDA, or CPU in Triton's interpreter), by which gradients are multiplied.
    Tensors whose addresses or sizes don't allow wide loads get a launch of their own. Waits for nothing on the device.
    """
    launches: dict[bool, list[tuple[Moved, tuple[int, ...]]]] = {True: [], False: []}
    for one in moved:
        row = one.row()
        if row[-1] > 0:
            launches[not any(number % 16 for number in row)].append((one, row))
    for aligned, pairs in launches.items():
        if pairs:
            _launch(*zip(*pairs, strict=True), clip, settings, aligned)
    torch.autograd.graph.increment_version([tensor for one in moved for tensor in (one.master, one.mean, one.square)])


def _launch(
    moved: Sequence[Moved], rows: Sequence[tuple[int, ...]], clip: Tensor, settings: Settings, aligned: bool
) -> None:
    device, sizes = clip.device, tuple(row[-1] for row in rows)
    block = min(triton.next_power_of_2(max(sizes)), BLOCK_INTERPRETED) if triton.knobs.runtime.interpret else BLOCK
    chunks = _chunks(sizes, BLOCKS * block, device)
    addresses = _on(device, rows, torch.int64)
    factors = _on(device, [_factors(one.count, settings) for one in moved], torch.float32)
    beta1, beta2 = settings.beta1, settings.beta2
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        _update_kernel[(len(chunks),)](
            addresses, factors, chunks, clip, 1 - settings.decay, beta1, 1 - beta1, beta2, 1 - beta2, settings.eps,
            BLOCK=block, BLOCKS=BLOCKS, COLUMNS=COLUMNS, ALIGNED=aligned, num_warps=WARPS,
        )  # fmt: skip


def _factors(count: float, settings: Settings) -> tuple[float, float]:
    """The rate over its bias correction, and the root of the second moment's."""
    return settings.rate / (1 - settings.beta1**count), math.sqrt(1 - settings.beta2**count)


def _on(device: torch.device, rows: Sequence[tuple], dtype: torch.dtype) -> Tensor:
    """A table on the device. From pinned memory, since a copy from other memory waits until the device has it."""
    return torch.tensor(rows, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


@functools.lru_cache(maxsize=8)  # the same at every step, but for tensors that got no gradient
def _chunks(sizes: tuple[int, ...], chunk: int, device: torch.device) -> Tensor:
    """int32 [programs, 2]: for each program its tensor, and the how manieth chunk of that."""
    counts = torch.tensor([triton.cdiv(size, chunk) for size in sizes])
    tensors = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    within = torch.arange(len(tensors)) - (counts.cumsum(0) - counts)[tensors]
    return torch.stack([tensors, within], dim=1).to(device, torch.int32)
