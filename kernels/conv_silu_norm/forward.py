"""The forward kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from .walk import (
    begins_below,
    chunk_of_rows,
    columns_of,
    convolved,
    group_of_heads,
    load_rows,
    load_starts,
    sigmoid_and_silu,
    sums_over_columns,
    widened,
)


@triton.jit
def _outputs(
    x, b_w, starts, row, eps, MASKED: tl.constexpr, NORMED: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """y of COUNT rows, fp32, and of NORMED ones r."""
    y, rstd = (), ()
    for u in tl.static_range(COUNT):
        _, b_y = sigmoid_and_silu(convolved(b_w, x, starts, row, u, MASKED, WIDE), WIDE)
        if NORMED:
            b_squares = sums_over_columns(b_y, b_y, WIDE) + eps
            b_rstd = (1.0 / tl.sqrt(b_squares)).to(tl.float32) if WIDE.is_fp64() else tl.rsqrt(b_squares)
            b_y *= b_rstd
            rstd += (b_rstd,)
        y += (b_y,)
    return y, rstd


@triton.jit
def _walk(
    p_x, p_weight, p_starts, p_y, p_rstd, i_head, o_part, first, T, rows, eps, X_STRIDE: tl.constexpr, WIDTH: tl.constexpr,
    HEADS: tl.constexpr, K: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, CHUNKS: tl.constexpr,
    UNROLL: tl.constexpr, STAGES: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """Rows first to first + rows - 1 of BH heads of q or k, which are NORMED, or of as many columns of v."""
    dtype: tl.constexpr = p_y.dtype.element_ty
    WIDE: tl.constexpr = tl.float64 if dtype == tl.float32 else tl.float32  # of sums, whose last bits fp32 tensors show
    o_h, m_h, o_c, m_c, b_w = columns_of(p_weight, i_head, o_part + WIDTH, K, BH, BD, CHUNKS)
    at = first.to(tl.int64)  # there may be more than 2^31 elements
    p_x, p_y, p_rstd = p_x + at * X_STRIDE + o_c, p_y + at * WIDTH + (o_c - o_part), p_rstd + at * HEADS + o_h
    x = widened(load_rows(p_x - 3 * X_STRIDE, X_STRIDE, m_c & (first > 0), first - 3, T, 3))
    for i in tl.range(0, rows, UNROLL, num_stages=STAGES):
        row = first + i
        here = x + widened(load_rows(p_x, X_STRIDE, m_c, row, T, UNROLL))
        (last,) = load_starts(p_starts, row + (UNROLL - 1), T, 1)
        if begins_below(last, row - 3, CHUNKS):
            starts = load_starts(p_starts, row, T, UNROLL)
            y, rstd = _outputs(here, b_w, starts, row, eps, True, NORMED, UNROLL, WIDE)
        else:
            y, rstd = _outputs(here, b_w, None, row, eps, False, NORMED, UNROLL, WIDE)
        for u in tl.static_range(UNROLL):
            tl.store(p_y + u * WIDTH, y[u].to(dtype), mask=m_c & (row + u < T))
            if NORMED:
                tl.store(p_rstd + u * HEADS, rstd[u], mask=m_h & (row + u < T))
        x = here[UNROLL:]
        p_x, p_y, p_rstd = p_x + UNROLL * X_STRIDE, p_y + UNROLL * WIDTH, p_rstd + UNROLL * HEADS


@triton.jit(do_not_specialize=["T", "rows"])  # another T compiles nothing
def forward_kernel(
    p_x, p_weight, p_starts, p_q, p_k, p_v, p_rstd, T, rows, eps, X_STRIDE: tl.constexpr,
    HK: tl.constexpr, K: tl.constexpr, VALUES: tl.constexpr, GROUPS_QK: tl.constexpr, GROUPS: tl.constexpr,
    BH: tl.constexpr, BD: tl.constexpr, CHUNKS: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program: `rows` rows of a group of BH heads. GROUPS_QK groups are q's, as many k's, and the others v's."""
    _, first = chunk_of_rows(rows, GROUPS, CHUNKS, BH)
    i_group = tl.program_id(0) % GROUPS
    if i_group < 2 * GROUPS_QK:
        p_y, i_head, o_part = group_of_heads(i_group, p_q, p_k, HK, K, GROUPS_QK, BH)
        _walk(
            p_x, p_weight, p_starts, p_y, p_rstd, i_head, o_part, first, T, rows, eps,
            X_STRIDE, HK * K, 2 * HK, K, BH, BD, CHUNKS, UNROLL, STAGES, True,
        )  # fmt: skip
    else:
        i_head = 2 * HK + (i_group - 2 * GROUPS_QK) * BH
        _walk(
            p_x, p_weight, p_starts, p_v, p_rstd, i_head, 2 * HK * K, first, T, rows, eps,
            X_STRIDE, VALUES, 2 * HK, K, BH, BD, CHUNKS, UNROLL, STAGES, False,
        )  # fmt: skip
