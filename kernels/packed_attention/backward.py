"""The backward kernels. Each program owns what it writes, so nothing is added to by two, and every sum has one order.

With p = 2^(s - lse), dp = do v^T, and ds = p (dp - delta), where delta is each row's sum of do o:  dq = scale ds k,
dk = scale ds^T q,  dv = p^T do. Whoever needs p and dp computes them again, which atomics would spare.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import around, blocks_of_keys, blocks_of_queries, load_rows, low_of, reach_of, store_rows


@triton.jit
def dq_kernel(
    p_q, p_k, p_v, p_o, p_do, p_lse, p_starts, p_dq, p_delta, T, scale, scale_2,
    q_t, q_h, k_t, k_h, v_t, v_h, do_t, do_h,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WINDOW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BM queries of one head over the keys that they see: p_dq [T, H, D], and p_delta [H, T] for the other kernel."""
    i_m, i_h = tl.cdiv(T, BM) - 1 - tl.program_id(0) // H, tl.program_id(0) % H
    i_first, i_last = i_m * BM, tl.minimum(i_m * BM + BM, T) - 1
    o_d, o_m = tl.arange(0, BD), tl.minimum(i_first + tl.arange(0, BM), i_last)  # rows beyond T repeat the last
    begin, end, middle, whole = blocks_of_keys(p_starts, i_first, i_last, WINDOW, BN)
    b_low = low_of(p_starts, o_m, WINDOW)
    p_k += i_h // GROUP * k_h
    p_v += i_h // GROUP * v_h
    o_row, i_rows = i_first + tl.arange(0, BM), tl.cast(i_h, tl.int64) * T
    b_do = load_rows(p_do + i_h * do_h, i_first, T, do_t, o_d, D, BM, False)
    b_o = load_rows(p_o + i_h * D, i_first, T, H * D, o_d, D, BM, False)
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    tl.store(p_delta + i_rows + o_row, b_delta, mask=o_row < T)
    b_lse = tl.load(p_lse + i_rows + o_row, mask=o_row < T, other=float("inf"))  # p of rows beyond T is 0
    b_q = load_rows(p_q + i_h * q_h, i_first, T, q_t, o_d, D, BM, False)
    b_dq = tl.zeros((BM, BD), tl.float32)
    for i in range(0, end - begin - whole):
        i_n = around(i, begin, middle, whole)
        b_dq = _add_dq(
            b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, i_n * BN, T, scale_2, k_t, v_t, o_d, o_m, b_low, D, BN, True
        )
    for i_n in range(middle, middle + whole):
        b_dq = _add_dq(
            b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, i_n * BN, T, scale_2, k_t, v_t, o_d, o_m, b_low, D, BN, False
        )
    store_rows(p_dq + i_h * D, i_first, T, b_dq * scale, o_d, H * D, D, BM)


@triton.jit
def _add_dq(
    b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, i_first, T, scale_2, k_t, v_t, o_d, o_m, b_low,
    D: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys and values, from i_first on. MASKED: some query does not see all of it."""
    b_k = load_rows(p_k, i_first, T, k_t, o_d, D, BN, not MASKED)
    b_v = load_rows(p_v, i_first, T, v_t, o_d, D, BN, not MASKED)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_2 - b_lse[:, None]  # [BM, BN]
    if MASKED:
        o_n = i_first + tl.arange(0, BN)
        b_s = tl.where((o_n[None, :] >= b_low[:, None]) & (o_n[None, :] <= o_m[:, None]), b_s, float("-inf"))
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
    b_ds = tl.exp2(b_s) * (b_dp - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")


@triton.jit
def dkdv_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_ends, p_dk, p_dv, T, scale, scale_2,
    q_t, q_h, k_t, k_h, v_t, v_h, do_t, do_h,
    H: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WINDOW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """BN keys of one key head over the queries that see them, in HEADS of its GROUP query heads one after another. DK, DV:
    which of p_dk and p_dv to write, both [T, H / HEADS, D]: where HEADS is not GROUP, parts of a sum."""
    SUMS: tl.constexpr = H // HEADS
    i_n, i_sum = tl.program_id(0) // SUMS, tl.program_id(0) % SUMS
    i_kv = i_sum * HEADS // GROUP
    i_first, i_last = i_n * BN, tl.minimum(i_n * BN + BN, T) - 1
    o_d, o_n = tl.arange(0, BD), i_first + tl.arange(0, BN)
    begin, end, middle, whole = blocks_of_queries(p_ends, i_first, i_last, WINDOW, BM)
    b_reach = reach_of(p_ends, tl.minimum(o_n, i_last), WINDOW)  # no query is after a key beyond T and before the end
    b_k = load_rows(p_k + i_kv * k_h, i_first, T, k_t, o_d, D, BN, False)
    b_v = load_rows(p_v + i_kv * v_h, i_first, T, v_t, o_d, D, BN, False) if DK else b_k
    b_dk, b_dv = tl.zeros((BN, BD), tl.float32), tl.zeros((BN, BD), tl.float32)
    blocks = end - begin - whole
    for i in range(0, HEADS * blocks):  # heads and blocks in one loop: its loads are ahead across heads, too
        i_head, i_block = _head_and_block(i, blocks, HEADS)
        i_h, i_m = i_sum * HEADS + i_head, around(i_block, begin, middle, whole)
        b_dk, b_dv = _add_dkdv(
            b_dk, b_dv, b_k, b_v, p_q + i_h * q_h, p_do + i_h * do_h, p_lse, p_delta, tl.cast(i_h, tl.int64) * T,
            i_m * BM, T, scale_2, q_t, do_t, o_d, o_n, b_reach, D, BM, DK, DV, True,
        )  # fmt: skip
    for i in range(0, HEADS * whole):
        i_head, i_block = _head_and_block(i, whole, HEADS)
        i_h, i_m = i_sum * HEADS + i_head, middle + i_block
        b_dk, b_dv = _add_dkdv(
            b_dk, b_dv, b_k, b_v, p_q + i_h * q_h, p_do + i_h * do_h, p_lse, p_delta, tl.cast(i_h, tl.int64) * T,
            i_m * BM, T, scale_2, q_t, do_t, o_d, o_n, b_reach, D, BM, DK, DV, False,
        )  # fmt: skip
    if DK:
        store_rows(p_dk + i_sum * D, i_first, T, b_dk * scale, o_d, SUMS * D, D, BN)
    if DV:
        store_rows(p_dv + i_sum * D, i_first, T, b_dv, o_d, SUMS * D, D, BN)


@triton.jit
def _head_and_block(i, blocks, HEADS: tl.constexpr):
    """What the i-th step of a walk over `blocks` blocks in each of HEADS heads is at."""
    if HEADS == 1:
        i_head, i_block = 0, i
    else:
        i_head, i_block = i // blocks, i % blocks
    return i_head, i_block


@triton.jit
def _add_dkdv(
    b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse, p_delta, i_rows, i_first, T, scale_2, q_t, do_t, o_d, o_n, b_reach,
    D: tl.constexpr, BM: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head, from i_first on. Scores are [BN, BM], as they are needed: keys by queries."""
    b_q = load_rows(p_q, i_first, T, q_t, o_d, D, BM, not MASKED)
    b_do = load_rows(p_do, i_first, T, do_t, o_d, D, BM, not MASKED)
    b_lse = _load_numbers(p_lse + i_rows, i_first, T, BM, not MASKED)
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale_2 - b_lse[None, :]
    if MASKED:
        o_m = i_first + tl.arange(0, BM)
        b_s = tl.where((o_m[None, :] >= o_n[:, None]) & (o_m[None, :] < b_reach[:, None]), b_s, float("-inf"))
    b_p = tl.exp2(b_s)
    if DV:
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
    if DK:
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
        b_ds = b_p * (b_dp - _load_numbers(p_delta + i_rows, i_first, T, BM, not MASKED)[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    return b_dk, b_dv


@triton.jit
def _load_numbers(p_head, i_first, T, BM: tl.constexpr, WHOLE: tl.constexpr):
    """One number a query, from i_first on; zeros where there is no query. WHOLE: there are BM."""
    o_m = i_first + tl.arange(0, BM)
    return tl.load(p_head + o_m) if WHOLE else tl.load(p_head + o_m, mask=o_m < T, other=0.0)


@triton.jit
def sum_kernel(p_parts, p_sum, rows, PARTS: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    """p_parts [rows, PARTS, D] fp32 -> p_sum [rows, D], parts added up in their order."""
    o_row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    m_block = (o_row < rows)[:, None] & (o_d < D)[None, :]
    p_block = p_parts + o_row[:, None] * (PARTS * D) + o_d[None, :]
    b_sum = tl.load(p_block, mask=m_block, other=0.0)
    for i in tl.static_range(1, PARTS):
        b_sum += tl.load(p_block + i * D, mask=m_block, other=0.0)
    tl.store(p_sum + o_row[:, None] * D + o_d[None, :], b_sum.to(p_sum.dtype.element_ty), mask=m_block)
