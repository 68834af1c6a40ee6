"""What the kernels share: which keys a query sees, which blocks of them need a mask, and how a block of rows is read.

The query at flat position i sees the keys from low(i) to i; the key at j is seen by the queries from j to below reach(j).
With s and e where a position's document begins and ends, low(i) = max(s, i - window + 1) and reach(j) = min(e, j + window).
Neither ever goes down from one position to the next, so a block's first and last row say what all of its rows see.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A row's largest score before its first. Finite: of a block that it sees nothing of, minus infinity would make NaN.
NOTHING_YET = tl.constexpr(-1e30)


@triton.jit
def low_of(p_starts, o_m, WINDOW: tl.constexpr):
    """The first key that each of the queries at o_m sees. WINDOW: 0 for none."""
    b_low = tl.load(p_starts + o_m)
    return tl.maximum(b_low, o_m - (WINDOW - 1)) if WINDOW else b_low


@triton.jit
def reach_of(p_ends, o_n, WINDOW: tl.constexpr):
    """One past the last query that sees each of the keys at o_n."""
    b_reach = tl.load(p_ends + o_n)
    return tl.minimum(b_reach, o_n + WINDOW) if WINDOW else b_reach


@triton.jit
def blocks_of_keys(p_starts, first, last, WINDOW: tl.constexpr, BN: tl.constexpr):
    """Of the queries from `first` to `last`: the first block of keys that any sees, and one past the last; and the first of
    those in the middle that every one of them sees whole, and how many."""
    begin = low_of(p_starts, first, WINDOW) // BN
    middle = tl.cdiv(low_of(p_starts, last, WINDOW), BN)
    return begin, last // BN + 1, middle, tl.maximum((first + 1) // BN - middle, 0)


@triton.jit
def blocks_of_queries(p_ends, first, last, WINDOW: tl.constexpr, BM: tl.constexpr):
    """The same of the keys from `first` to `last` and the blocks of queries that see them."""
    middle = tl.cdiv(last, BM)
    whole = tl.maximum(reach_of(p_ends, first, WINDOW) // BM - middle, 0)
    return first // BM, tl.cdiv(reach_of(p_ends, last, WINDOW), BM), middle, whole


@triton.jit
def around(i, begin, middle, whole):
    """The i-th block, from `begin` on, of those that are not among the `whole` ones in the middle."""
    i_block = begin + i
    return tl.where(i_block < middle, i_block, i_block + whole)


@triton.jit
def load_rows(p_head, i_first, rows, stride, o_d, D: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Rows i_first to i_first + BLOCK of a head [rows, D], `stride` elements apart, [BLOCK, columns]; zeros where there are
    none. WHOLE: all of these rows exist."""
    p_block = p_head + tl.cast(i_first, tl.int64) * stride  # int64: there may be more than 2^31 elements
    o_row = tl.arange(0, BLOCK)
    p_block += o_row[:, None] * stride + o_d[None, :]
    m_row, m_d = (o_row < rows - i_first)[:, None], (o_d < D)[None, :]
    ALL_COLUMNS: tl.constexpr = o_d.shape[0] == D
    if WHOLE and ALL_COLUMNS:
        b_rows = tl.load(p_block)
    elif WHOLE:
        b_rows = tl.load(p_block, mask=m_d, other=0.0)
    elif ALL_COLUMNS:
        b_rows = tl.load(p_block, mask=m_row, other=0.0)
    else:
        b_rows = tl.load(p_block, mask=m_row & m_d, other=0.0)
    return b_rows


@triton.jit
def store_rows(p_head, i_first, rows, b_rows, o_d, STRIDE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of `load_rows`, rounded to the tensor's dtype."""
    p_block = p_head + tl.cast(i_first, tl.int64) * STRIDE
    o_row = tl.arange(0, BLOCK)
    m_block = (o_row < rows - i_first)[:, None]
    if o_d.shape[0] != D:
        m_block = m_block & (o_d < D)[None, :]
    tl.store(p_block + o_row[:, None] * STRIDE + o_d[None, :], b_rows.to(p_head.dtype.element_ty), mask=m_block)
