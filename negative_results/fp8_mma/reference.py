"""What is emulated, in plain PyTorch: quantisation to e4m3, and the product of what was quantised.

A row is multiplied by 448 over its largest magnitude, so that it fills e4m3 (448 is the largest finite number there), and
rounded to the nearest of its numbers, ties to even. Codes are e4m3's bits as uint8, which a module's `to(dtype)` keeps.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
NAN = 0x7F  # the code of every NaN; which sign a NaN has differs from machine to machine
FLOOR = 2.0**-117  # a row's largest magnitude counts as at least so much: both 448 over it and it over 448 are normal fp32


def quantise_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K], bfloat16, float16 or float32 -> codes [T, K] uint8, scales [T] fp32; x is about decode(codes) * scales.

    A row of zeros has codes 0. A NaN makes its whole row and its scale NaN; an infinity makes its row's scale infinite and
    its own code NaN, so that whatever is multiplied with the row shows it.
    """
    wide = x.float()
    largest = wide.abs().amax(-1).clamp(min=FLOOR)
    full = torch.full_like(largest, LARGEST)  # PyTorch may multiply by one over a Python number instead of dividing
    scaled = wide * (full / largest)[:, None]
    codes = scaled.clamp(-LARGEST, LARGEST).to(E4M3).view(torch.uint8)
    return codes.masked_fill_(scaled.isnan(), NAN), largest / full


def decode(codes: Tensor) -> Tensor:
    """The numbers that codes stand for, exactly, in fp32."""
    return codes.view(E4M3).float()


def exact_sums(codes_x: Tensor, codes_w: Tensor) -> Tensor:
    """decode(codes_x) [T, K] times decode(codes_w) [O, K] transposed -> [T, O] fp64, without any rounding up to K = 2^17.

    A product of two e4m3 numbers is a multiple of 2^-18 below 2^18, so a sum of 2^17 of them has no more than 53 bits, in
    whatever order it is taken.
    """
    return decode(codes_x).double() @ decode(codes_w).double().t()


def product_reference(codes_x: Tensor, scales_x: Tensor, codes_w: Tensor, scales_w: Tensor, dtype: torch.dtype) -> Tensor:
    """codes_x [T, K], scales_x [T], codes_w [O, K], scales_w [O] -> [T, O] in `dtype`.

    The exact sum rounded to fp32 once, times the row's scale, times the column's, each rounded to fp32, then to `dtype`: the
    kernel's bits wherever the kernel's sums need no rounding.
    """
    return (exact_sums(codes_x, codes_w).float() * scales_x[:, None] * scales_w).to(dtype)
