"""The forward kernel: a program has BM queries of one head and walks over the keys that they see, BN at a time.

The softmax is summed as it goes along (Milakov and Gimelshein 2018, arXiv 1805.02867), in powers of two: scale has log2 e in
it. A block that a query sees nothing of changes none of its bits: its largest score stays, and what is added is exactly 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import NOTHING_YET, around, blocks_of_keys, load_rows, low_of, store_rows


@triton.jit
def forward_kernel(
    p_q, p_k, p_v, p_o, p_lse, p_starts, T, scale, q_t, q_h, k_t, k_h, v_t, v_h,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WINDOW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """p_o [T, H, D] and p_lse [H, T], the base-2 logarithm of a row's sum. GROUP query heads share a key head."""
    # from the end of the pack: the last queries of a long document have the most keys, and should not be left to the last
    i_m, i_h = tl.cdiv(T, BM) - 1 - tl.program_id(0) // H, tl.program_id(0) % H
    i_first, i_last = i_m * BM, tl.minimum(i_m * BM + BM, T) - 1
    o_d, o_m = tl.arange(0, BD), tl.minimum(i_first + tl.arange(0, BM), i_last)  # rows beyond T repeat the last
    begin, end, middle, whole = blocks_of_keys(p_starts, i_first, i_last, WINDOW, BN)
    b_low = low_of(p_starts, o_m, WINDOW)
    p_k += i_h // GROUP * k_h
    p_v += i_h // GROUP * v_h
    b_q = load_rows(p_q + i_h * q_h, i_first, T, q_t, o_d, D, BM, False)
    b_max = tl.full((BM,), NOTHING_YET, tl.float32)
    b_sum = tl.zeros((BM,), tl.float32)
    b_o = tl.zeros((BM, BD), tl.float32)
    for i in range(0, end - begin - whole):
        i_n = around(i, begin, middle, whole)
        b_o, b_max, b_sum = _attend(
            b_q, b_o, b_max, b_sum, p_k, p_v, i_n * BN, T, scale, k_t, v_t, o_d, o_m, b_low, D, BN, True
        )
    for i_n in range(middle, middle + whole):
        b_o, b_max, b_sum = _attend(
            b_q, b_o, b_max, b_sum, p_k, p_v, i_n * BN, T, scale, k_t, v_t, o_d, o_m, b_low, D, BN, False
        )
    o_row = i_first + tl.arange(0, BM)
    tl.store(p_lse + tl.cast(i_h, tl.int64) * T + o_row, b_max * scale + tl.log2(b_sum), mask=o_row < T)
    store_rows(p_o + i_h * D, i_first, T, b_o * (1.0 / b_sum)[:, None], o_d, H * D, D, BM)


@triton.jit
def _attend(
    b_q, b_o, b_max, b_sum, p_k, p_v, i_first, T, scale, k_t, v_t, o_d, o_m, b_low,
    D: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys and values, from i_first on. MASKED: some query does not see all of it."""
    b_k = load_rows(p_k, i_first, T, k_t, o_d, D, BN, not MASKED)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BM, BN]
    if MASKED:
        o_n = i_first + tl.arange(0, BN)
        b_s = tl.where((o_n[None, :] >= b_low[:, None]) & (o_n[None, :] <= o_m[:, None]), b_s, float("-inf"))
    b_now = tl.maximum(b_max, tl.max(b_s, 1))
    b_p = tl.exp2(b_s * scale - (b_now * scale)[:, None])
    b_shrink = tl.exp2((b_max - b_now) * scale)
    b_v = load_rows(p_v, i_first, T, v_t, o_d, D, BN, not MASKED)
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_shrink[:, None], input_precision="ieee")
    return b_o, b_now, b_sum * b_shrink + tl.sum(b_p, 1)
