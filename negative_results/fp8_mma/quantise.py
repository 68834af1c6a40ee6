"""Quantisation of rows to e4m3 in Triton: two passes over a row, the second out of a cache.

The rounding is integer arithmetic, not Triton's cast: that one needs an instruction that sm_80 has not, and rounds otherwise
in Triton's interpreter. So these bits are the same on every GPU and on a box without one, and they are the reference's.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import LARGEST, NAN

BLOCK = 2048  # 4 warps x 16 elements a thread
WARPS = 4
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

FLOOR_BITS = tl.constexpr((127 - 117) << 23)  # of reference.FLOOR as fp32
INFINITY_BITS = tl.constexpr(0x7F800000)
LARGEST_BITS = tl.constexpr(0x43E00000)  # of 448
NORMAL_BITS = tl.constexpr((127 - 6) << 23)  # of 2^-6, from which on e4m3 is normal
SUBNORMAL_UNIT = tl.constexpr(2.0**14)  # its last bit counts for 2^-9, as a subnormal's does
SUBNORMAL_BITS = tl.constexpr((127 + 14) << 23)
REBIAS = tl.constexpr((127 - 7) << 3)
SIZE_MASK = tl.constexpr(0x7FFFFFFF)
FULL = tl.constexpr(LARGEST)
NAN_CODE = tl.constexpr(NAN)


@triton.jit
def _e4m3(b_x):
    """The e4m3 code of each fp32 value: to nearest, ties to even, beyond 448 to 448, NaN to 0x7F."""
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_size = b_bits & SIZE_MASK
    b_kept = tl.minimum(b_size, LARGEST_BITS)
    b_normal = ((b_kept + 0x7FFFF + ((b_kept >> 20) & 1)) >> 20) - REBIAS
    b_subnormal = (b_kept.to(tl.float32, bitcast=True) + SUBNORMAL_UNIT).to(tl.int32, bitcast=True) - SUBNORMAL_BITS
    b_code = tl.where(b_kept < NORMAL_BITS, b_subnormal, b_normal) | ((b_bits >> 24) & 0x80)
    return tl.where(b_size > INFINITY_BITS, NAN_CODE, b_code).to(tl.uint8)


@triton.jit
def _quantise_kernel(p_x, p_codes, p_scales, K, BLOCK: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK)
    b_largest = tl.full((BLOCK,), FLOOR_BITS, tl.int32)
    for start in range(0, K, BLOCK):
        b_x = tl.load(p_x + i_row * K + start + o_k, mask=start + o_k < K, other=0.0).to(tl.float32)
        # as integers magnitudes are in the same order, and a NaN is above them all
        b_largest = tl.maximum(b_largest, b_x.to(tl.int32, bitcast=True) & SIZE_MASK)
    largest = tl.max(b_largest, axis=0).to(tl.float32, bitcast=True)
    inverse = tl.div_rn(FULL, largest)
    tl.store(p_scales + i_row, tl.div_rn(largest, FULL))
    for start in range(0, K, BLOCK):
        m_k = start + o_k < K
        b_x = tl.load(p_x + i_row * K + start + o_k, mask=m_k, other=0.0).to(tl.float32)
        tl.store(p_codes + i_row * K + start + o_k, _e4m3(b_x * inverse), mask=m_k)


def block_for(K: int) -> int:
    """Elements a program takes at a time."""
    return min(triton.next_power_of_2(K), BLOCK)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.quantise_rows_reference` in one launch, bit for bit. x [T, K] on CUDA, or in Triton's interpreter."""
    if x.ndim != 2 or x.dtype not in DTYPES:
        raise ValueError(f"rows [T, K] in {', '.join(map(str, DTYPES))} can be quantised, not {list(x.shape)} {x.dtype}")
    x, (T, K) = x.contiguous(), x.shape
    codes = torch.empty((T, K), dtype=torch.uint8, device=x.device)
    scales = torch.empty(T, dtype=torch.float32, device=x.device)
    if x.numel():
        device = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
        with device:
            _quantise_kernel[(T,)](x, codes, scales, K, BLOCK=block_for(K), num_warps=WARPS)
    return codes, scales
