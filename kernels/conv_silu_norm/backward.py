"""The backward kernel, and the sum of the weight's gradient over its programs."""

from __future__ import annotations

import triton
import triton.language as tl

from .walk import (
    begins_below,
    chunk_of_rows,
    columns_of,
    convolved,
    four_taps,
    group_of_heads,
    load_rows,
    load_starts,
    sigmoid_and_silu,
    sums_over_columns,
    widened,
)


@triton.jit
def _differentiated(
    x, b_w, dy, rstd, starts, row, MASKED: tl.constexpr, NORMED: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """The gradient of p of COUNT rows from that of y, fp32: da = r (dy - silu r^2 sum(dy silu)) or dy, and dp = da silu'."""
    dp = ()
    for u in tl.static_range(COUNT):
        b_sigmoid, b_silu = sigmoid_and_silu(convolved(b_w, x, starts, row, u, MASKED, WIDE), WIDE)
        b_da = dy[u]
        if NORMED:
            b_share = (sums_over_columns(b_da, b_silu, WIDE) * rstd[u] * -rstd[u]).to(tl.float32)
            b_da = tl.fma(b_share, b_silu, b_da) * rstd[u]
        dp += (b_da * tl.fma(b_silu, 1.0 - b_sigmoid, b_sigmoid),)
    return dp


@triton.jit
def _input_gradients(
    x, b_w, dp, b_dw, starts, row, MASKED: tl.constexpr, DWEIGHT: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """dx of COUNT rows from `row` on, fp32, and with DWEIGHT the sums of dw with what these rows of x add to each. x, dp and
    starts hold rows from `row` on. MASKED: without what would come from another document."""
    dx = ()
    for u in tl.static_range(COUNT):
        b_0, b_1, b_2, b_3 = dp[u], dp[u + 1], dp[u + 2], dp[u + 3]
        if MASKED:
            b_1, b_2 = tl.where(starts[u + 1] <= row + u, b_1, 0.0), tl.where(starts[u + 2] <= row + u, b_2, 0.0)
            b_3 = tl.where(starts[u + 3] <= row + u, b_3, 0.0)
        dx += (four_taps(b_w, b_3, b_2, b_1, b_0, WIDE),)
        if DWEIGHT:
            b_x = x[u].to(WIDE)
            b_dw0, b_dw1 = tl.fma(b_x, b_3.to(WIDE), b_dw[0]), tl.fma(b_x, b_2.to(WIDE), b_dw[1])
            b_dw = (b_dw0, b_dw1, tl.fma(b_x, b_1.to(WIDE), b_dw[2]), tl.fma(b_x, b_0.to(WIDE), b_dw[3]))
    return dx, b_dw


@triton.jit
def _first_three(
    p_x, p_starts, p_rstd, p_dy, b_w, first, T, m_c, m_h, X_STRIDE: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr,
    CHUNKS: tl.constexpr, NORMED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """x and dp of rows first to first + 2, fp32."""
    above = load_rows(p_x - 3 * X_STRIDE, X_STRIDE, m_c & (first > 0), first - 3, T, 3)
    x = widened(above + load_rows(p_x, X_STRIDE, m_c, first, T, 3))
    dy, rstd = widened(load_rows(p_dy, WIDTH, m_c, first, T, 3)), load_rows(p_rstd, HEADS, m_h, first, T, 3)
    starts = load_starts(p_starts, first, T, 3)
    if begins_below(starts[2], first - 3, CHUNKS):
        dp = _differentiated(x, b_w, dy, rstd, starts, first, True, NORMED, 3, WIDE)
    else:
        dp = _differentiated(x, b_w, dy, rstd, None, first, False, NORMED, 3, WIDE)
    return x[3:], dp


@triton.jit
def _walk(
    p_x, p_weight, p_starts, p_rstd, p_dy, p_dx, p_partial, i_head, o_part, i_chunk, first, T, rows,
    X_STRIDE: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    BH: tl.constexpr, BD: tl.constexpr, CHUNKS: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr,
    NORMED: tl.constexpr, DWEIGHT: tl.constexpr,
):  # fmt: skip
    """dx of rows first to first + rows - 1 of BH heads of q or k, which are NORMED, or of as many columns of v, and the sums
    of dw over these rows of x. A step takes in rows three below those that it writes."""
    dtype: tl.constexpr = p_dx.dtype.element_ty
    WIDE: tl.constexpr = tl.float64 if dtype == tl.float32 else tl.float32  # of sums, whose last bits fp32 tensors show
    o_h, m_h, o_c, m_c, b_w = columns_of(p_weight, i_head, o_part + WIDTH, K, BH, BD, CHUNKS)
    m_h = m_h & NORMED
    at = first.to(tl.int64)  # there may be more than 2^31 elements
    p_x, p_dy, p_dx = p_x + at * X_STRIDE + o_c, p_dy + at * WIDTH + (o_c - o_part), p_dx + at * C + o_c
    p_rstd += at * HEADS + o_h
    b_zero = tl.zeros([CHUNKS * BH, BD], dtype=WIDE)
    b_dw = (b_zero, b_zero, b_zero, b_zero)
    x, dp = _first_three(
        p_x, p_starts, p_rstd, p_dy, b_w, first, T, m_c, m_h, X_STRIDE, WIDTH, HEADS, CHUNKS, NORMED, WIDE
    )  # fmt: skip
    for i in tl.range(0, rows, UNROLL, num_stages=STAGES):
        out, row = first + i, first + (i + 3)
        below = load_rows(p_x + 3 * X_STRIDE, X_STRIDE, m_c, row, T, UNROLL)
        below_dy = load_rows(p_dy + 3 * WIDTH, WIDTH, m_c, row, T, UNROLL)
        rstd = load_rows(p_rstd + 3 * HEADS, HEADS, m_h, row, T, UNROLL)
        (last,) = load_starts(p_starts, row + (UNROLL - 1), T, 1)
        here, dy = x + widened(below), widened(below_dy)
        if begins_below(last, out, CHUNKS):
            starts = load_starts(p_starts, out, T, UNROLL + 3)
            all_dp = dp + _differentiated(here, b_w, dy, rstd, starts[3:], row, True, NORMED, UNROLL, WIDE)
            dx, b_dw = _input_gradients(here, b_w, all_dp, b_dw, starts, out, True, DWEIGHT, UNROLL, WIDE)
        else:
            all_dp = dp + _differentiated(here, b_w, dy, rstd, None, row, False, NORMED, UNROLL, WIDE)
            dx, b_dw = _input_gradients(here, b_w, all_dp, b_dw, None, out, False, DWEIGHT, UNROLL, WIDE)
        for u in tl.static_range(UNROLL):
            tl.store(p_dx + u * C, dx[u].to(dtype), mask=m_c & (out + u < T))
        x, dp = here[UNROLL:], all_dp[UNROLL:]
        p_x, p_dy, p_dx = p_x + UNROLL * X_STRIDE, p_dy + UNROLL * WIDTH, p_dx + UNROLL * C
        p_rstd += UNROLL * HEADS
    if DWEIGHT:
        p_partial += i_chunk.to(tl.int64) * (4 * C) + o_c
        for tap in tl.static_range(4):
            tl.store(p_partial + tap * C, b_dw[tap].to(tl.float32), mask=m_c)


@triton.jit(do_not_specialize=["T", "rows"])  # another T compiles nothing
def backward_kernel(
    p_x, p_weight, p_starts, p_rstd, p_dq, p_dk, p_dv, p_dx, p_partial, T, rows, X_STRIDE: tl.constexpr,
    HK: tl.constexpr, K: tl.constexpr, VALUES: tl.constexpr, GROUPS_QK: tl.constexpr, GROUPS: tl.constexpr,
    BH: tl.constexpr, BD: tl.constexpr, CHUNKS: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr,
    DWEIGHT: tl.constexpr,
):  # fmt: skip
    """A program: `rows` rows of a group of BH heads. GROUPS_QK groups are q's, as many k's, and the others v's."""
    i_chunk, first = chunk_of_rows(rows, GROUPS, CHUNKS, BH)
    i_group = tl.program_id(0) % GROUPS
    C: tl.constexpr = 2 * HK * K + VALUES
    if i_group < 2 * GROUPS_QK:
        p_dy, i_head, o_part = group_of_heads(i_group, p_dq, p_dk, HK, K, GROUPS_QK, BH)
        _walk(
            p_x, p_weight, p_starts, p_rstd, p_dy, p_dx, p_partial, i_head, o_part, i_chunk, first, T, rows,
            X_STRIDE, HK * K, 2 * HK, C, K, BH, BD, CHUNKS, UNROLL, STAGES, True, DWEIGHT,
        )  # fmt: skip
    else:
        i_head = 2 * HK + (i_group - 2 * GROUPS_QK) * BH
        _walk(
            p_x, p_weight, p_starts, p_rstd, p_dv, p_dx, p_partial, i_head, 2 * HK * K, i_chunk, first, T, rows,
            X_STRIDE, VALUES, 2 * HK, C, K, BH, BD, CHUNKS, UNROLL, STAGES, False, DWEIGHT,
        )  # fmt: skip


@triton.jit
def reduce_kernel(p_partial, p_dweight, chunks, C: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    """p_partial [chunks, 4, C] fp32 -> p_dweight [C, 4], BC of the 4 C sums a program."""
    o_p, o_c = tl.arange(0, BP), tl.program_id(0) * BC + tl.arange(0, BC)
    dtype: tl.constexpr = p_dweight.dtype.element_ty
    WIDE: tl.constexpr = tl.float64 if dtype == tl.float32 else tl.float32  # of sums, whose last bits fp32 tensors show
    m_block = (o_p < chunks)[:, None] & (o_c < 4 * C)[None, :]
    b_partial = tl.load(p_partial + o_p[:, None] * (4 * C) + o_c[None, :], mask=m_block, other=0.0)  # [BP, BC]
    b_sum = tl.sum(b_partial.to(WIDE), axis=0)
    tl.store(p_dweight + (o_c % C) * 4 + o_c // C, b_sum.to(dtype), mask=o_c < 4 * C)
