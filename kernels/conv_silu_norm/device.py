"""The Triton kernels of conv_silu_norm: forward, backward, and the sum of the weight's gradient over programs."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _sigmoid_and_silu(b_x, WIDE: tl.constexpr):
    """fp32 in and out. For fp32 tensors, whose last bits show it, with the full-precision exp and division; otherwise each
    of the two is one special function and a multiplication."""
    if INTERPRETED:  # there is no libdevice; NumPy's functions are accurate already
        b_denominator = 1.0 + tl.exp(-b_x)
        b_sigmoid, b_silu = 1.0 / b_denominator, b_x / b_denominator
    elif WIDE.is_fp64():
        b_denominator = 1.0 + libdevice.exp(-b_x)
        b_sigmoid, b_silu = tl.div_rn(1.0, b_denominator), tl.div_rn(b_x, b_denominator)
    else:
        b_sigmoid = libdevice.fast_dividef(1.0, 1.0 + libdevice.fast_expf(-b_x))
        b_silu = b_x * b_sigmoid
    return b_sigmoid, b_silu


@triton.jit
def _row_sums(b_a, b_b, WIDE: tl.constexpr):
    """Sums of a b over columns, wide. Products are rounded before they are added: where a lane has one alone, fusing it with
    the addition of its neighbour's would leave lanes with different sums of a row, which all of them write to one place."""
    b_a, b_b = b_a.to(WIDE), b_b.to(WIDE)
    b_products = b_a * b_b if INTERPRETED else libdevice.mul_rn(b_a, b_b)
    return tl.sum(b_products, axis=1)


@triton.jit
def _products(b_w3, b_w2, b_w1, b_w0, b_a, b_b, b_c, b_d, WIDE: tl.constexpr):
    """w3 a + w2 b + w1 c + w0 d in fp32."""
    b_sum = b_w3.to(WIDE) * b_a.to(WIDE) + b_w2.to(WIDE) * b_b.to(WIDE)
    b_sum += b_w1.to(WIDE) * b_c.to(WIDE)
    return (b_sum + b_w0.to(WIDE) * b_d.to(WIDE)).to(tl.float32)


@triton.jit
def _part(i_head, p_q, p_k, p_v, HK: tl.constexpr, K: tl.constexpr, VALUES: tl.constexpr):
    """Which of three dense tensors holds the head, the tensor's first column in the projection, and its width."""
    if i_head < HK:
        p_part, o_part, width = p_q, 0, HK * K
    elif i_head < 2 * HK:
        p_part, o_part, width = p_k, HK * K, HK * K
    else:
        p_part, o_part, width = p_v, 2 * HK * K, VALUES
    return p_part, o_part, width


@triton.jit
def _weights(p_weight, o_c, m_c):
    """The four taps of columns o_c, fp32, the last one first: it is for the row itself."""
    b_w3 = tl.load(p_weight + o_c * 4 + 3, mask=m_c, other=0.0).to(tl.float32)
    b_w2 = tl.load(p_weight + o_c * 4 + 2, mask=m_c, other=0.0).to(tl.float32)
    b_w1 = tl.load(p_weight + o_c * 4 + 1, mask=m_c, other=0.0).to(tl.float32)
    b_w0 = tl.load(p_weight + o_c * 4, mask=m_c, other=0.0).to(tl.float32)
    return b_w3, b_w2, b_w1, b_w0


@triton.jit
def forward_kernel(
    p_x, p_weight, p_starts, p_q, p_k, p_v, p_rstd, T, x_stride, eps,
    HK: tl.constexpr, K: tl.constexpr, VALUES: tl.constexpr, BLOCKS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A program: BT rows of one head of q or k, or of as many columns of v."""
    dtype: tl.constexpr = p_q.dtype.element_ty
    WIDE: tl.constexpr = tl.float64 if dtype == tl.float32 else tl.float32  # of sums, whose last bits fp32 tensors show
    i_head = tl.program_id(0) % BLOCKS  # heads of the same rows next to one another
    o_t = (tl.program_id(0) // BLOCKS).to(tl.int64) * BT + tl.arange(0, BT)  # int64: there may be more than 2^31 elements
    o_d = tl.arange(0, BD)
    o_c = i_head * K + o_d
    m_t = o_t < T
    m_c = (o_d < K) & (o_c < 2 * HK * K + VALUES)
    b_start = tl.load(p_starts + o_t, mask=m_t, other=0)
    b_sum = tl.zeros([BT, BD], dtype=tl.float32).to(WIDE)
    for back in tl.static_range(4):  # rows above the row itself, zero where that is another document
        b_w = tl.load(p_weight + o_c * 4 + (3 - back), mask=m_c, other=0.0).to(tl.float32).to(WIDE)
        m_tap = (m_t & (o_t - back >= b_start))[:, None] & m_c[None, :]
        b_x = tl.load(p_x + (o_t - back)[:, None] * x_stride + o_c[None, :], mask=m_tap, other=0.0)
        b_sum += b_w[None, :] * b_x.to(tl.float32).to(WIDE)
    b_pre = b_sum.to(tl.float32)
    _, b_y = _sigmoid_and_silu(b_pre, WIDE)
    if i_head < 2 * HK:
        b_squares = _row_sums(b_y, b_y, WIDE) + eps
        b_rstd = (1.0 / tl.sqrt(b_squares)).to(tl.float32) if dtype == tl.float32 else tl.rsqrt(b_squares)
        tl.store(p_rstd + o_t * (2 * HK) + i_head, b_rstd, mask=m_t)
        b_y = b_y * b_rstd[:, None]
    p_part, o_part, width = _part(i_head, p_q, p_k, p_v, HK, K, VALUES)
    tl.store(p_part + o_t[:, None] * width + (o_c - o_part)[None, :], b_y.to(dtype), mask=m_t[:, None] & m_c[None, :])


@triton.jit
def _load_row(p_x, p_dy, p_rstd, p_start, m_c, m_h, inside, T):
    """A row of x and dy [BH, BD], of r [BH, 1], and where its document begins; zeros and T where there is no such row."""
    b_x = tl.load(p_x, mask=m_c & inside, other=0.0)
    b_dy = tl.load(p_dy, mask=m_c & inside, other=0.0)
    return b_x, b_dy, tl.load(p_rstd, mask=m_h & inside, other=0.0), tl.load(p_start, mask=inside, other=T)


@triton.jit
def _begins_below(start, row, CHUNKS: tl.constexpr):
    """Whether any document begins below its row."""
    return start > row if CHUNKS == 1 else tl.max(start - row) > 0


@triton.jit
def _differentiate_row(b_pre, b_dy, b_rstd, normed, WIDE: tl.constexpr):
    """The gradient of p [BH, BD] from that of y, fp32."""
    b_sigmoid, b_silu = _sigmoid_and_silu(b_pre, WIDE)
    b_da = b_dy
    if normed:
        b_y = b_silu * b_rstd
        b_sum = _row_sums(b_dy, b_y, WIDE).to(tl.float32)
        b_da = b_rstd * (b_dy - b_y * b_sum[:, None])
    return b_da * (b_sigmoid + b_silu * (1.0 - b_sigmoid))


@triton.jit
def _convolve_row(b_w3, b_w2, b_w1, b_w0, b_xd, b_xc, b_xb, b_xa, s, start_d, begins, WIDE: tl.constexpr):
    """p of row s + 3, fp32, from x of rows s + 3 to s. Where the document begins below s, what is above it is left out: that
    is rare, and a branch costs less than choosing element by element."""
    b_pre = _products(b_w3, b_w2, b_w1, b_w0, b_xd, b_xc, b_xb, b_xa, WIDE)
    if begins:
        b_xc, b_xb = tl.where(start_d <= s + 2, b_xc, 0.0), tl.where(start_d <= s + 1, b_xb, 0.0)
        b_pre = _products(b_w3, b_w2, b_w1, b_w0, b_xd, b_xc, b_xb, tl.where(start_d <= s, b_xa, 0.0), WIDE)
    return b_pre


@triton.jit
def _input_gradient(
    b_w3, b_w2, b_w1, b_w0, b_da, b_db, b_dc, b_dd, s, start_b, start_c, start_d, begins, WIDE: tl.constexpr
):  # fmt: skip
    """dx of row s, fp32, from dp of rows s to s + 3 and where their documents begin."""
    b_dx = _products(b_w3, b_w2, b_w1, b_w0, b_da, b_db, b_dc, b_dd, WIDE)
    if begins:
        b_db, b_dc = tl.where(start_b <= s, b_db, 0.0), tl.where(start_c <= s, b_dc, 0.0)
        b_dx = _products(b_w3, b_w2, b_w1, b_w0, b_da, b_db, b_dc, tl.where(start_d <= s, b_dd, 0.0), WIDE)
    return b_dx


@triton.jit
def _weight_gradient(
    b_dw3, b_dw2, b_dw1, b_dw0, b_x, b_da, b_db, b_dc, b_dd, s, start_b, start_c, start_d, begins, WIDE: tl.constexpr
):  # fmt: skip
    """The sums of dw, wide, with what row s of x adds to each: its products with dp of rows s to s + 3."""
    b_x = b_x.to(WIDE)
    b_dw3 += b_x * b_da.to(WIDE)
    if begins:
        b_dw2 += b_x * tl.where(start_b <= s, b_db, 0.0).to(WIDE)
        b_dw1 += b_x * tl.where(start_c <= s, b_dc, 0.0).to(WIDE)
        b_dw0 += b_x * tl.where(start_d <= s, b_dd, 0.0).to(WIDE)
    else:
        b_dw2 += b_x * b_db.to(WIDE)
        b_dw1 += b_x * b_dc.to(WIDE)
        b_dw0 += b_x * b_dd.to(WIDE)
    return b_dw3, b_dw2, b_dw1, b_dw0


@triton.jit
def _first_head(i_group, HK: tl.constexpr, GROUPS_QK: tl.constexpr, BH: tl.constexpr):
    """The first head of a group of BH: GROUPS_QK groups are of q, as many of k, the others of v, and none of two of them."""
    if i_group < GROUPS_QK:
        i_head = i_group * BH
    elif i_group < 2 * GROUPS_QK:
        i_head = HK + (i_group - GROUPS_QK) * BH
    else:
        i_head = 2 * HK + (i_group - 2 * GROUPS_QK) * BH
    return i_head


@triton.jit
def backward_kernel(
    p_x, p_weight, p_starts, p_rstd, p_dq, p_dk, p_dv, p_dx, p_partial, T, rows, x_stride,
    HK: tl.constexpr, K: tl.constexpr, VALUES: tl.constexpr, GROUPS_QK: tl.constexpr, GROUPS: tl.constexpr,
    BH: tl.constexpr, BD: tl.constexpr, CHUNKS: tl.constexpr, DWEIGHT: tl.constexpr,
):  # fmt: skip
    """A program walks down `rows` rows of BH heads. At row s its windows hold rows s, s + 1 and s + 2 of x and dp, and row
    s + 3 comes in, asked for one row ahead. With CHUNKS > 1 it walks down as many chunks of `rows` rows side by side, which
    spares the interpreter programs; rows are then [CHUNKS BH, 1] where otherwise they are numbers."""
    dtype: tl.constexpr = p_dx.dtype.element_ty
    WIDE: tl.constexpr = tl.float64 if dtype == tl.float32 else tl.float32  # of sums, whose last bits fp32 tensors show
    C: tl.constexpr = 2 * HK * K + VALUES
    i_head = _first_head(tl.program_id(0) % GROUPS, HK, GROUPS_QK, BH)
    p_dy, o_part, width = _part(i_head, p_dq, p_dk, p_dv, HK, K, VALUES)
    o_w, o_d = tl.arange(0, CHUNKS * BH)[:, None], tl.arange(0, BD)[None, :]
    o_h = i_head + o_w % BH
    o_c = o_h * K + o_d  # [CHUNKS BH, BD]
    m_h, m_c = o_h < 2 * HK, (o_d < K) & (o_c < o_part + width)
    i_chunk = tl.program_id(0) // GROUPS if CHUNKS == 1 else tl.program_id(0) // GROUPS * CHUNKS + o_w // BH
    b_w3, b_w2, b_w1, b_w0 = _weights(p_weight, o_c, m_c)
    b_dw3 = tl.zeros([CHUNKS * BH, BD], dtype=tl.float32).to(WIDE)
    b_dw2, b_dw1, b_dw0 = b_dw3, b_dw3, b_dw3

    first = i_chunk * rows
    row = first.to(tl.int64)  # there may be more than 2^31 elements
    p_x, p_dy, p_dx = p_x + row * x_stride + o_c, p_dy + row * width + (o_c - o_part), p_dx + (row - 3) * C + o_c
    p_rstd, p_starts = p_rstd + row * (2 * HK) + o_h, p_starts + row
    b_xa = tl.load(p_x - 3 * x_stride, mask=m_c & (first >= 3) & (first - 3 < T), other=0.0).to(tl.float32)
    b_xb = tl.load(p_x - 2 * x_stride, mask=m_c & (first >= 2) & (first - 2 < T), other=0.0).to(tl.float32)
    b_xc = tl.load(p_x - x_stride, mask=m_c & (first >= 1) & (first - 1 < T), other=0.0).to(tl.float32)
    # Zeros for each: Triton takes a name that is given the value it began with, even by another name, for unchanged.
    b_da = tl.zeros([CHUNKS * BH, BD], dtype=tl.float32)
    b_db = tl.zeros([CHUNKS * BH, BD], dtype=tl.float32)
    b_dc = tl.zeros([CHUNKS * BH, BD], dtype=tl.float32)
    start_b, start_c = first * 0 + T, first * 0 + T
    b_next_x, b_next_dy, b_next_rstd, next_start = _load_row(p_x, p_dy, p_rstd, p_starts, m_c, m_h, first < T, T)
    for i in range(-3, rows):
        s = first + i
        b_xd, b_dy, b_rstd, start_d = b_next_x.to(tl.float32), b_next_dy.to(tl.float32), b_next_rstd, next_start
        p_x, p_dy, p_rstd, p_starts = p_x + x_stride, p_dy + width, p_rstd + 2 * HK, p_starts + 1
        b_next_x, b_next_dy, b_next_rstd, next_start = _load_row(p_x, p_dy, p_rstd, p_starts, m_c, m_h, s + 4 < T, T)
        begins = _begins_below(start_d, s, CHUNKS)
        b_pre = _convolve_row(b_w3, b_w2, b_w1, b_w0, b_xd, b_xc, b_xb, b_xa, s, start_d, begins, WIDE)
        b_dd = _differentiate_row(b_pre, b_dy, b_rstd, i_head < 2 * HK, WIDE)
        if i >= 0:
            b_dx = _input_gradient(
                b_w3, b_w2, b_w1, b_w0, b_da, b_db, b_dc, b_dd, s, start_b, start_c, start_d, begins, WIDE
            )  # fmt: skip
            tl.store(p_dx, b_dx.to(dtype), mask=m_c & (s < T))
            if DWEIGHT:
                b_dw3, b_dw2, b_dw1, b_dw0 = _weight_gradient(
                    b_dw3, b_dw2, b_dw1, b_dw0, b_xa, b_da, b_db, b_dc, b_dd, s, start_b, start_c, start_d, begins, WIDE
                )
        b_xa, b_xb, b_xc, b_da, b_db, b_dc = b_xb, b_xc, b_xd, b_db, b_dc, b_dd
        start_b, start_c, p_dx = start_c, start_d, p_dx + C

    if DWEIGHT:
        p_partial += i_chunk.to(tl.int64) * (4 * C) + o_c
        tl.store(p_partial + 3 * C, b_dw3.to(tl.float32), mask=m_c)
        tl.store(p_partial + 2 * C, b_dw2.to(tl.float32), mask=m_c)
        tl.store(p_partial + C, b_dw1.to(tl.float32), mask=m_c)
        tl.store(p_partial, b_dw0.to(tl.float32), mask=m_c)


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
