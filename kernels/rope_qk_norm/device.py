"""The Triton kernels of rope_qk_norm: forward, backward, and the sum of the weights' gradients over programs.

A row, one head at one position, is read as two halves: column i of one is rotated with column i of the other where i < J,
half of what is rotated, and behind those each half has its share of the columns that are passed on. So one thread has both
columns of a pair: nothing is read twice, and nothing is exchanged.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows(i_tile, T, HEADS: tl.constexpr, BT: tl.constexpr):
    """Rows [BT, 1] of a tile, heads of a position next to one another; their positions and heads; which rows exist."""
    o_row = tl.cast(i_tile, tl.int32) * BT + tl.arange(0, BT)[:, None]
    o_t = o_row // HEADS
    return o_row.to(tl.int64), o_t.to(tl.int64), o_row % HEADS, o_t < T  # int64: there may be more than 2^31 elements


@triton.jit
def _columns(D: tl.constexpr, J: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, VEC: tl.constexpr):
    """Of both halves [1, BH] the columns and which of them exist; and i with what is rotated. VEC columns lie side by side,
    which the compiler can't see."""
    o_i = tl.arange(0, BH)
    o_low, o_high = tl.where(o_i < J, o_i, o_i + J), tl.where(o_i < J, o_i + J, o_i + HALF)
    o_low = tl.max_contiguous(tl.multiple_of(o_low, VEC), VEC)[None, :]
    o_high = tl.max_contiguous(tl.multiple_of(o_high, VEC), VEC)[None, :]
    o_i = o_i[None, :]
    return o_low, o_i < HALF, o_high, o_i < D - HALF, o_i, o_i < J


@triton.jit
def _scale(p_weight, o_d, m_d, BT: tl.constexpr, ZERO_CENTRED: tl.constexpr):
    """[BT, BH], every row the same: read as a tile is, and so laid out as a tile is, without a barrier."""
    o_tile = tl.broadcast_to(o_d, [BT, o_d.shape[1]])
    b_weight = tl.load(p_weight + o_tile, mask=m_d, other=0.0).to(tl.float32)
    return 1.0 + b_weight if ZERO_CENTRED else b_weight


@triton.jit
def _angles(p_cos, p_sin, o_t, o_i, m_turned, J: tl.constexpr):
    """fp32 [BT, BH] each: the first half's cosine and sine, the second half's; 1 and 0 where nothing is rotated."""
    o_angle = o_t * (2 * J) + o_i
    b_cos_low = tl.load(p_cos + o_angle, mask=m_turned, other=1.0).to(tl.float32)
    b_sin_low = tl.load(p_sin + o_angle, mask=m_turned, other=0.0).to(tl.float32)
    b_cos_high = tl.load(p_cos + o_angle + J, mask=m_turned, other=1.0).to(tl.float32)
    b_sin_high = tl.load(p_sin + o_angle + J, mask=m_turned, other=0.0).to(tl.float32)
    return b_cos_low, b_sin_low, b_cos_high, b_sin_high


@triton.jit
def _forward_tile(
    p_x, p_weight, p_cos, p_sin, p_y, p_rstd, i_tile, T, t_stride, h_stride, eps, HEADS: tl.constexpr, D: tl.constexpr,
    J: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, VEC: tl.constexpr, BT: tl.constexpr, ZERO_CENTRED: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = p_y.dtype.element_ty
    WIDE: tl.constexpr = tl.float64 if dtype == tl.float32 else tl.float32  # of sums, whose last bits fp32 tensors show
    o_row, o_t, o_h, m_t = _rows(i_tile, T, HEADS, BT)
    o_low, m_low, o_high, m_high, o_i, m_turned = _columns(D, J, HALF, BH, VEC)
    p_row = p_x + o_t * t_stride + o_h * h_stride
    b_cos_low, b_sin_low, b_cos_high, b_sin_high = _angles(p_cos, p_sin, o_t, o_i, m_t & m_turned, J)
    b_scale_low = _scale(p_weight, o_low, m_low, BT, ZERO_CENTRED)
    b_scale_high = _scale(p_weight, o_high, m_high, BT, ZERO_CENTRED)
    b_low = tl.load(p_row + o_low, mask=m_t & m_low, other=0.0).to(tl.float32)  # [BT, BH]
    b_high = tl.load(p_row + o_high, mask=m_t & m_high, other=0.0).to(tl.float32)
    b_squares = b_low.to(WIDE) * b_low.to(WIDE) + b_high.to(WIDE) * b_high.to(WIDE)
    b_mean = tl.sum(b_squares, axis=1)[:, None] / D
    b_rstd = (1.0 / tl.sqrt(b_mean + eps)).to(tl.float32) if dtype == tl.float32 else tl.rsqrt(b_mean + eps)
    b_low, b_high = b_low * b_rstd * b_scale_low, b_high * b_rstd * b_scale_high
    p_out = p_y + o_row * D
    tl.store(p_out + o_low, (b_low * b_cos_low - b_high * b_sin_low).to(dtype), mask=m_t & m_low)
    tl.store(p_out + o_high, (b_high * b_cos_high + b_low * b_sin_high).to(dtype), mask=m_t & m_high)
    tl.store(p_rstd + o_row, b_rstd, mask=m_t)  # last: where it is brought into another layout, warps wait for one another


@triton.jit
def forward_kernel(
    p_q, p_k, p_qw, p_kw, p_cos, p_sin, p_qy, p_ky, p_qrstd, p_krstd, T, q_tiles,
    qt_stride, qh_stride, kt_stride, kh_stride, eps, H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr,
    J: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, VEC: tl.constexpr, BT: tl.constexpr, ZERO_CENTRED: tl.constexpr,
):  # fmt: skip
    """The first q_tiles programs have a tile of the query's rows each, the others one of the key's."""
    i_tile = tl.program_id(0)
    if i_tile < q_tiles:
        _forward_tile(
            p_q, p_qw, p_cos, p_sin, p_qy, p_qrstd, i_tile, T, qt_stride, qh_stride, eps, H,
            D, J, HALF, BH, VEC, BT, ZERO_CENTRED,
        )  # fmt: skip
    else:
        _forward_tile(
            p_k, p_kw, p_cos, p_sin, p_ky, p_krstd, i_tile - q_tiles, T, kt_stride, kh_stride, eps, KV,
            D, J, HALF, BH, VEC, BT, ZERO_CENTRED,
        )  # fmt: skip


@triton.jit
def _differentiate_tile(
    p_dy, p_x, p_rstd, p_cos, p_sin, p_dx, b_scale_low, b_scale_high, i_tile, T, dt_stride, dh_stride, t_stride, h_stride,
    HEADS: tl.constexpr, D: tl.constexpr, J: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, VEC: tl.constexpr,
    BT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes dx of a tile, and returns what its rows add to dw of both halves, wide [BT, BH], zero where nothing is."""
    dtype: tl.constexpr = p_dx.dtype.element_ty
    o_row, o_t, o_h, m_t = _rows(i_tile, T, HEADS, BT)
    o_low, m_low, o_high, m_high, o_i, m_turned = _columns(D, J, HALF, BH, VEC)
    p_dy_row, p_row = p_dy + o_t * dt_stride + o_h * dh_stride, p_x + o_t * t_stride + o_h * h_stride
    b_cos_low, b_sin_low, b_cos_high, b_sin_high = _angles(p_cos, p_sin, o_t, o_i, m_t & m_turned, J)
    b_dy_low = tl.load(p_dy_row + o_low, mask=m_t & m_low, other=0.0).to(tl.float32)  # [BT, BH]
    b_dy_high = tl.load(p_dy_row + o_high, mask=m_t & m_high, other=0.0).to(tl.float32)
    b_low = tl.load(p_row + o_low, mask=m_t & m_low, other=0.0).to(tl.float32)
    b_high = tl.load(p_row + o_high, mask=m_t & m_high, other=0.0).to(tl.float32)
    b_rstd = tl.load(p_rstd + o_row, mask=m_t, other=0.0)
    b_back_low = b_dy_low * b_cos_low + b_dy_high * b_sin_high  # rotated back
    b_back_high = b_dy_high * b_cos_high - b_dy_low * b_sin_low
    b_low, b_high = b_low * b_rstd, b_high * b_rstd
    b_c_low, b_c_high = b_back_low * b_scale_low, b_back_high * b_scale_high
    b_products = b_c_low.to(WIDE) * b_low.to(WIDE) + b_c_high.to(WIDE) * b_high.to(WIDE)
    b_mean = (tl.sum(b_products, axis=1)[:, None] / D).to(tl.float32)
    p_out = p_dx + o_row * D
    tl.store(p_out + o_low, (b_rstd * (b_c_low - b_low * b_mean)).to(dtype), mask=m_t & m_low)
    tl.store(p_out + o_high, (b_rstd * (b_c_high - b_high * b_mean)).to(dtype), mask=m_t & m_high)
    return b_back_low.to(WIDE) * b_low.to(WIDE), b_back_high.to(WIDE) * b_high.to(WIDE)


@triton.jit
def _backward_tiles(
    p_dy, p_x, p_weight, p_rstd, p_cos, p_sin, p_dx, p_partial, i_program, programs, T, tiles,
    dt_stride, dh_stride, t_stride, h_stride, HEADS: tl.constexpr, D: tl.constexpr, J: tl.constexpr, HALF: tl.constexpr,
    BH: tl.constexpr, VEC: tl.constexpr, BT: tl.constexpr, ZERO_CENTRED: tl.constexpr, DWEIGHT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One of `programs` that share `tiles`."""
    WIDE: tl.constexpr = tl.float64 if p_dx.dtype.element_ty == tl.float32 else tl.float32
    o_low, m_low, o_high, m_high, _, _ = _columns(D, J, HALF, BH, VEC)
    b_scale_low = _scale(p_weight, o_low, m_low, BT, ZERO_CENTRED)
    b_scale_high = _scale(p_weight, o_high, m_high, BT, ZERO_CENTRED)
    if DWEIGHT:
        b_dweight_low = tl.zeros([BT, BH], dtype=tl.float32).to(WIDE)
        b_dweight_high = tl.zeros([BT, BH], dtype=tl.float32).to(WIDE)
        for i_tile in tl.range(i_program, tiles, programs, num_stages=STAGES):
            b_add_low, b_add_high = _differentiate_tile(
                p_dy, p_x, p_rstd, p_cos, p_sin, p_dx, b_scale_low, b_scale_high, i_tile, T,
                dt_stride, dh_stride, t_stride, h_stride, HEADS, D, J, HALF, BH, VEC, BT, WIDE,
            )  # fmt: skip
            b_dweight_low += b_add_low
            b_dweight_high += b_add_high
        p_row = p_partial + i_program.to(tl.int64) * D
        tl.store(p_row + o_low, tl.sum(b_dweight_low, axis=0)[None, :].to(tl.float32), mask=m_low)
        tl.store(p_row + o_high, tl.sum(b_dweight_high, axis=0)[None, :].to(tl.float32), mask=m_high)
    else:
        _differentiate_tile(
            p_dy, p_x, p_rstd, p_cos, p_sin, p_dx, b_scale_low, b_scale_high, i_program, T,
            dt_stride, dh_stride, t_stride, h_stride, HEADS, D, J, HALF, BH, VEC, BT, WIDE,
        )  # fmt: skip


@triton.jit
def backward_kernel(
    p_dqy, p_dky, p_q, p_k, p_qw, p_kw, p_cos, p_sin, p_qrstd, p_krstd, p_dq, p_dk, p_partial,
    T, q_tiles, k_tiles, q_programs, k_programs,
    dqt_stride, dqh_stride, dkt_stride, dkh_stride, qt_stride, qh_stride, kt_stride, kh_stride,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, J: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr,
    VEC: tl.constexpr, BT: tl.constexpr, ZERO_CENTRED: tl.constexpr, DWEIGHT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The first q_programs programs share the tiles of the query's rows, the k_programs others the key's: without DWEIGHT a
    tile each, with it every so manieth. p_partial [programs, D] takes each program's share of dw."""
    i_program = tl.program_id(0)
    if i_program < q_programs:
        _backward_tiles(
            p_dqy, p_q, p_qw, p_qrstd, p_cos, p_sin, p_dq, p_partial, i_program, q_programs, T, q_tiles,
            dqt_stride, dqh_stride, qt_stride, qh_stride, H, D, J, HALF, BH, VEC, BT, ZERO_CENTRED, DWEIGHT, STAGES,
        )  # fmt: skip
    else:
        _backward_tiles(
            p_dky, p_k, p_kw, p_krstd, p_cos, p_sin, p_dk, p_partial + q_programs * D, i_program - q_programs, k_programs,
            T, k_tiles, dkt_stride, dkh_stride, kt_stride, kh_stride, KV, D, J, HALF, BH, VEC, BT, ZERO_CENTRED, DWEIGHT,
            STAGES,
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
