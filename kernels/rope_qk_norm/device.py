"""The Triton kernels of rope_qk_norm: forward, backward, and the sum of the weights' gradients over programs.

A row, one head at one position, is a tile [G, BJ] of groups of J columns, J half of what is rotated: the first group is
rotated with the second, the others are passed on. So a column's partner is a whole group away, and is read, out of the
cache, as wide as the column itself.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows(i_tile, T, HEADS: tl.constexpr, BT: tl.constexpr):
    """Position and head of a tile's rows [BT, 1, 1], heads of a position next to one another, and which rows exist."""
    o_row = i_tile * BT + tl.arange(0, BT)[:, None, None]
    o_t = o_row // HEADS
    return o_t.to(tl.int64), o_row % HEADS, o_t < T  # int64: there may be more than 2^31 elements


@triton.jit
def _columns(D: tl.constexpr, J: tl.constexpr, G: tl.constexpr, BJ: tl.constexpr):
    """Each column and its partner [1, G, BJ], which columns exist, and which are rotated; elsewhere it is its own."""
    o_g, o_j = tl.arange(0, G)[None, :, None], tl.arange(0, BJ)[None, None, :]
    o_d = o_g * J + o_j
    o_partner = tl.where(o_g == 0, 1, tl.where(o_g == 1, 0, o_g)) * J + o_j
    m_d = (o_j < J) & (o_d < D)
    return o_d, o_partner, m_d, m_d & (o_g < 2)


@triton.jit
def _scale(p_weight, o_d, m_d, ZERO_CENTRED: tl.constexpr):
    b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    return 1.0 + b_weight if ZERO_CENTRED else b_weight


@triton.jit
def _sum_rows(b_x, WIDE: tl.constexpr):
    """[BT, G, BJ] -> [BT, 1, 1]."""
    return tl.sum(tl.sum(b_x.to(WIDE), axis=2), axis=1)[:, None, None]


@triton.jit
def _forward_tile(
    p_x, p_weight, p_cos, p_sin, p_y, p_rstd, i_tile, T, t_stride, h_stride, eps, HEADS: tl.constexpr,
    D: tl.constexpr, J: tl.constexpr, G: tl.constexpr, BJ: tl.constexpr, BT: tl.constexpr, ZERO_CENTRED: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = p_y.dtype.element_ty
    WIDE: tl.constexpr = tl.float64 if dtype == tl.float32 else tl.float32  # of sums, whose last bits fp32 tensors show
    o_t, o_h, m_t = _rows(i_tile, T, HEADS, BT)
    o_d, o_partner, m_d, m_turned = _columns(D, J, G, BJ)
    p_row = p_x + o_t * t_stride + o_h * h_stride
    b_scale = _scale(p_weight, o_d, m_d, ZERO_CENTRED)  # before the tile, or the tile is brought into the weight's layout
    b_partner_scale = _scale(p_weight, o_partner, m_turned, ZERO_CENTRED)
    b_x = tl.load(p_row + o_d, mask=m_t & m_d, other=0.0).to(tl.float32)  # [BT, G, BJ]
    b_partner = tl.load(p_row + o_partner, mask=m_t & m_turned, other=0.0).to(tl.float32)
    b_cos = tl.load(p_cos + o_t * (2 * J) + o_d, mask=m_t & m_turned, other=1.0).to(tl.float32)
    b_sin = tl.load(p_sin + o_t * (2 * J) + o_d, mask=m_t & m_turned, other=0.0).to(tl.float32)
    b_mean = _sum_rows(b_x.to(WIDE) * b_x.to(WIDE), WIDE) / D
    b_rstd = (1.0 / tl.sqrt(b_mean + eps)).to(tl.float32) if dtype == tl.float32 else tl.rsqrt(b_mean + eps)
    tl.store(p_rstd + o_t * HEADS + o_h, b_rstd, mask=m_t)
    b_straight = b_x * b_rstd * b_scale
    b_across = b_partner * b_rstd * b_partner_scale
    b_y = b_straight * b_cos + tl.where(o_d < J, -b_across, b_across) * b_sin
    tl.store(p_y + (o_t * HEADS + o_h) * D + o_d, b_y.to(dtype), mask=m_t & m_d)


@triton.jit
def forward_kernel(
    p_q, p_k, p_qw, p_kw, p_cos, p_sin, p_qy, p_ky, p_qrstd, p_krstd, T, q_tiles,
    qt_stride, qh_stride, kt_stride, kh_stride, eps, H: tl.constexpr, KV: tl.constexpr,
    D: tl.constexpr, J: tl.constexpr, G: tl.constexpr, BJ: tl.constexpr, BT: tl.constexpr, ZERO_CENTRED: tl.constexpr,
):  # fmt: skip
    """The first q_tiles programs have a tile of the query's rows each, the others one of the key's."""
    i_tile = tl.program_id(0)
    if i_tile < q_tiles:
        _forward_tile(
            p_q, p_qw, p_cos, p_sin, p_qy, p_qrstd, i_tile, T, qt_stride, qh_stride, eps, H, D, J, G, BJ, BT, ZERO_CENTRED
        )
    else:
        _forward_tile(
            p_k, p_kw, p_cos, p_sin, p_ky, p_krstd, i_tile - q_tiles, T, kt_stride, kh_stride, eps, KV,
            D, J, G, BJ, BT, ZERO_CENTRED,
        )  # fmt: skip


@triton.jit
def _differentiate_tile(
    p_dy, p_x, p_rstd, p_cos, p_sin, p_dx, b_scale, i_tile, T, dt_stride, dh_stride, t_stride, h_stride,
    HEADS: tl.constexpr, D: tl.constexpr, J: tl.constexpr, G: tl.constexpr, BJ: tl.constexpr, BT: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Writes dx of a tile, and returns what its rows add to dw, wide [BT, G, BJ], zero where there is no element."""
    o_t, o_h, m_t = _rows(i_tile, T, HEADS, BT)
    o_d, o_partner, m_d, m_turned = _columns(D, J, G, BJ)
    p_row = p_dy + o_t * dt_stride + o_h * dh_stride
    b_dy = tl.load(p_row + o_d, mask=m_t & m_d, other=0.0).to(tl.float32)
    b_partner = tl.load(p_row + o_partner, mask=m_t & m_turned, other=0.0).to(tl.float32)
    b_x = tl.load(p_x + o_t * t_stride + o_h * h_stride + o_d, mask=m_t & m_d, other=0.0).to(tl.float32)
    b_cos = tl.load(p_cos + o_t * (2 * J) + o_d, mask=m_t & m_turned, other=1.0).to(tl.float32)
    b_sin = tl.load(p_sin + o_t * (2 * J) + o_partner, mask=m_t & m_turned, other=0.0).to(tl.float32)
    b_rstd = tl.load(p_rstd + o_t * HEADS + o_h, mask=m_t, other=0.0)
    b_back = b_dy * b_cos + tl.where(o_d < J, b_partner, -b_partner) * b_sin  # rotated back
    b_normed = b_x * b_rstd
    b_c = b_back * b_scale
    b_mean = (_sum_rows(b_c.to(WIDE) * b_normed.to(WIDE), WIDE) / D).to(tl.float32)
    b_dx = b_rstd * (b_c - b_normed * b_mean)
    tl.store(p_dx + (o_t * HEADS + o_h) * D + o_d, b_dx.to(p_dx.dtype.element_ty), mask=m_t & m_d)
    return b_back.to(WIDE) * b_normed.to(WIDE)


@triton.jit
def _backward_tiles(
    p_dy, p_x, p_weight, p_rstd, p_cos, p_sin, p_dx, p_partial, i_program, T, tiles,
    dt_stride, dh_stride, t_stride, h_stride, HEADS: tl.constexpr,
    D: tl.constexpr, J: tl.constexpr, G: tl.constexpr, BJ: tl.constexpr, BT: tl.constexpr,
    ZERO_CENTRED: tl.constexpr, DWEIGHT: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = p_dx.dtype.element_ty
    WIDE: tl.constexpr = tl.float64 if dtype == tl.float32 else tl.float32
    o_d, _, m_d, _ = _columns(D, J, G, BJ)
    b_scale = _scale(p_weight, o_d, m_d, ZERO_CENTRED)
    if DWEIGHT:
        b_dweight = tl.zeros([BT, G, BJ], dtype=tl.float32).to(WIDE)
        for i in tl.range(0, tiles):
            b_dweight += _differentiate_tile(
                p_dy, p_x, p_rstd, p_cos, p_sin, p_dx, b_scale, i_program * tiles + i, T,
                dt_stride, dh_stride, t_stride, h_stride, HEADS, D, J, G, BJ, BT, WIDE,
            )  # fmt: skip
        b_sum = tl.sum(b_dweight, axis=0)[None, :, :].to(tl.float32)  # [1, G, BJ]
        tl.store(p_partial + i_program.to(tl.int64) * D + o_d, b_sum, mask=m_d)
    else:
        _differentiate_tile(
            p_dy, p_x, p_rstd, p_cos, p_sin, p_dx, b_scale, i_program, T,
            dt_stride, dh_stride, t_stride, h_stride, HEADS, D, J, G, BJ, BT, WIDE,
        )  # fmt: skip


@triton.jit
def backward_kernel(
    p_dqy, p_dky, p_q, p_k, p_qw, p_kw, p_cos, p_sin, p_qrstd, p_krstd, p_dq, p_dk, p_partial, T, q_programs, tiles,
    dqt_stride, dqh_stride, dkt_stride, dkh_stride, qt_stride, qh_stride, kt_stride, kh_stride,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, J: tl.constexpr, G: tl.constexpr, BJ: tl.constexpr,
    BT: tl.constexpr, ZERO_CENTRED: tl.constexpr, DWEIGHT: tl.constexpr,
):  # fmt: skip
    """The first q_programs programs have `tiles` tiles of the query's rows each, the others as many of the key's."""
    i_program = tl.program_id(0)
    if i_program < q_programs:
        _backward_tiles(
            p_dqy, p_q, p_qw, p_qrstd, p_cos, p_sin, p_dq, p_partial, i_program, T, tiles,
            dqt_stride, dqh_stride, qt_stride, qh_stride, H, D, J, G, BJ, BT, ZERO_CENTRED, DWEIGHT,
        )  # fmt: skip
    else:
        _backward_tiles(
            p_dky, p_k, p_kw, p_krstd, p_cos, p_sin, p_dk, p_partial + q_programs * D, i_program - q_programs, T, tiles,
            dkt_stride, dkh_stride, kt_stride, kh_stride, KV, D, J, G, BJ, BT, ZERO_CENTRED, DWEIGHT,
        )  # fmt: skip


@triton.jit
def reduce_kernel(p_partial, p_dqw, p_dkw, q_programs, programs, D: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    """p_partial [programs, D] fp32 -> the query weight's gradient from the first q_programs rows, the key's from others."""
    dtype: tl.constexpr = p_dqw.dtype.element_ty
    WIDE: tl.constexpr = tl.float64 if dtype == tl.float32 else tl.float32
    o_p, o_c = tl.arange(0, BP)[:, None], tl.program_id(0) * BC + tl.arange(0, BC)
    of_query = tl.program_id(1) == 0
    m_p = (o_p < q_programs) == of_query
    m_block = m_p & (o_p < programs) & (o_c < D)[None, :]
    b_partial = tl.load(p_partial + o_p * D + o_c[None, :], mask=m_block, other=0.0)  # [BP, BC]
    b_sum = tl.sum(b_partial.to(WIDE), axis=0).to(dtype)
    if of_query:
        tl.store(p_dqw + o_c, b_sum, mask=o_c < D)
    else:
        tl.store(p_dkw + o_c, b_sum, mask=o_c < D)
