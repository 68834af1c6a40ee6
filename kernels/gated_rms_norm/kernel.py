"""Gated RMSNorm in Triton: kernels, custom ops, autograd, public function.

With r = (mean(x^2) + eps)^-1/2, n = x r and s = sigmoid(gate):  y = n w gate s,  dgate = dy n w s (1 + gate (1 - s)),
dw = sum over rows of dy n gate s,  dx = r (c - n mean(c n)) with c = dy w gate s.
Backward reads x, gate and r; dw is summed first per program, then over programs, in an order that the shape fixes.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Elements of a program's tile and of a warp's share: 8 a thread, so that a tensor is one 16-byte load, and all are on their
# way before the first is waited for. Where dw is wanted, 16, and STAGES - 1 tiles are fetched ahead into shared memory.
TILE, ELEMENTS_A_WARP = 1024, 256
TILE_DWEIGHT, ELEMENTS_A_WARP_DWEIGHT, STAGES = 2048, 512, 3
BYTES_AHEAD = 48 << 10  # of shared memory at most, which every GPU lets a program have
TILE_INTERPRETED = 1 << 15  # the interpreter's cost is per program, not per element
# That share the rows where dw is wanted: a constant, so that no device sums in another order; an H200 runs them all at once.
WARPS_DWEIGHT = 16 * 132
COLUMNS, WARPS_REDUCE = 8, 8  # of the partial sums that one program adds up: 32 bytes of a row; and its warps
COLUMNS_INTERPRETED = 32  # the interpreter's cost is per program; a column's sum depends on the column alone
WIDEST = 1 << 16  # elements of a row, which one program holds in registers
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _tile(i_tile, T, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """Rows [BT], columns [BD], which rows exist, and which elements of the tile [BT, BD] do."""
    o_t = tl.cast(i_tile, tl.int64) * BT + tl.arange(0, BT)  # int64: an activation may hold more than 2^31 elements
    o_d = tl.arange(0, BD)
    m_t = o_t < T
    return o_t, o_d, m_t, m_t[:, None] & (o_d < D)[None, :]


@triton.jit
def _wide(b_x, dtype: tl.constexpr):
    """What is to be summed: in fp64 where tensors are fp32, whose last bits show the order of a sum."""
    return b_x.to(tl.float64) if dtype == tl.float32 else b_x


@triton.jit
def _accurate_exp(b_x):
    """The interpreter has no libdevice; its tl.exp is NumPy's, accurate already."""
    return tl.exp(b_x) if INTERPRETED else libdevice.exp(b_x)


@triton.jit
def _fast_exp(b_x):
    """tl.exp without its care for results below fp32's normal range: they are 0, beside the 1 that they are added to."""
    return tl.exp(b_x) if INTERPRETED else libdevice.fast_expf(b_x)


@triton.jit
def _fast_reciprocal(b_x):
    """To 2 units in the last place; a result below fp32's normal range, the sigmoid of a gate under -87, is 0."""
    return 1.0 / b_x if INTERPRETED else libdevice.fast_dividef(1.0, b_x)


@triton.jit
def _sigmoid_and_silu(b_gate, dtype: tl.constexpr):
    """fp32 in and out. For fp32 tensors, whose last bits show it, with the full-precision exp and division."""
    if dtype == tl.float32:
        b_denominator = 1.0 + _accurate_exp(-b_gate)
        b_sigmoid = tl.div_rn(1.0, b_denominator)
        b_silu = tl.div_rn(b_gate, b_denominator)
    else:
        b_sigmoid = _fast_reciprocal(1.0 + _fast_exp(-b_gate))
        b_silu = b_gate * b_sigmoid
    return b_sigmoid, b_silu


@triton.jit
def _weight(p_weight, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """[BT, BD], every row the same: read as a tile is, and so laid out as a tile is, without a barrier."""
    o_d = tl.broadcast_to(tl.arange(0, BD)[None, :], [BT, BD])
    return tl.load(p_weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)


@triton.jit
def _rstd(b_x, eps, D: tl.constexpr, dtype: tl.constexpr):
    """fp32 [BT] from fp32 [BT, BD]; its error would be that of a whole row."""
    b_mean = tl.sum(_wide(b_x, dtype) * _wide(b_x, dtype), axis=1) / D
    return (1.0 / tl.sqrt(b_mean + eps)).to(tl.float32) if dtype == tl.float32 else tl.rsqrt(b_mean + eps)


@triton.jit
def _forward_kernel(
    p_x, p_gate, p_weight, p_y, p_rstd, T, x_stride, gate_stride, eps, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    dtype = p_y.dtype.element_ty
    o_t, o_d, m_t, m_tile = _tile(tl.program_id(0), T, D, BT, BD)
    b_x = tl.load(p_x + o_t[:, None] * x_stride + o_d[None, :], mask=m_tile, other=0.0).to(tl.float32)  # [BT, BD]
    b_gate = tl.load(p_gate + o_t[:, None] * gate_stride + o_d[None, :], mask=m_tile, other=0.0).to(tl.float32)
    b_weight = _weight(p_weight, D, BT, BD)
    b_rstd = _rstd(b_x, eps, D, dtype)
    b_normed = (b_x * b_rstd[:, None]).to(dtype).to(tl.float32)  # rounds where the reference does, here and once more
    b_scaled = (b_weight * b_normed).to(dtype).to(tl.float32)
    _, b_silu = _sigmoid_and_silu(b_gate, dtype)
    tl.store(p_y + o_t[:, None] * D + o_d[None, :], (b_scaled * b_silu).to(dtype), mask=m_tile)
    tl.store(p_rstd + o_t, b_rstd, mask=m_t)  # last: where it is brought into another layout, warps wait for one another


@triton.jit
def _differentiate_tile(
    p_dy, p_x, p_gate, p_rstd, p_dx, p_dgate, b_weight, i_tile, T, dy_stride, x_stride, gate_stride,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Writes dx and dgate of one tile, returns its dy n silu(gate), wide [BT, BD], zero where there is no element."""
    dtype = p_dx.dtype.element_ty
    o_t, o_d, m_t, m_tile = _tile(i_tile, T, D, BT, BD)
    b_dy = tl.load(p_dy + o_t[:, None] * dy_stride + o_d[None, :], mask=m_tile, other=0.0).to(tl.float32)
    b_x = tl.load(p_x + o_t[:, None] * x_stride + o_d[None, :], mask=m_tile, other=0.0).to(tl.float32)
    b_gate = tl.load(p_gate + o_t[:, None] * gate_stride + o_d[None, :], mask=m_tile, other=0.0).to(tl.float32)
    b_rstd = tl.load(p_rstd + o_t, mask=m_t, other=0.0)[:, None]
    b_sigmoid, b_silu = _sigmoid_and_silu(b_gate, dtype)
    b_normed = b_x * b_rstd
    o_tile = o_t[:, None] * D + o_d[None, :]
    b_dgate = b_dy * (b_normed * b_weight) * b_sigmoid * (1.0 + b_gate * (1.0 - b_sigmoid))
    tl.store(p_dgate + o_tile, b_dgate.to(dtype), mask=m_tile)
    b_dscaled = b_dy * b_silu
    b_c = b_dscaled * b_weight
    b_mean = (tl.sum(_wide(b_c, dtype) * _wide(b_normed, dtype), axis=1) / D).to(tl.float32)
    b_dx = b_rstd * (b_c - b_normed * b_mean[:, None])
    tl.store(p_dx + o_tile, b_dx.to(dtype), mask=m_tile)
    return _wide(b_dscaled, dtype) * _wide(b_normed, dtype)


@triton.jit
def _backward_kernel(
    p_dy, p_x, p_gate, p_weight, p_rstd, p_dx, p_dgate, p_partial, T, tiles, dy_stride, x_stride, gate_stride,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, DWEIGHT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A tile a program; with DWEIGHT each of P has every P-th of `tiles`, and p_partial [P, D] takes its share of dw."""
    i_program = tl.program_id(0)
    o_d = tl.arange(0, BD)
    b_weight = _weight(p_weight, D, BT, BD)
    if DWEIGHT:
        b_dweight = _wide(tl.zeros([BT, BD], dtype=tl.float32), p_dx.dtype.element_ty)
        for i_tile in tl.range(i_program, tiles, tl.num_programs(0), num_stages=STAGES):
            b_dweight += _differentiate_tile(
                p_dy, p_x, p_gate, p_rstd, p_dx, p_dgate, b_weight, i_tile, T,
                dy_stride, x_stride, gate_stride, D, BT, BD,
            )  # fmt: skip
        o_partial = i_program.to(tl.int64) * D + o_d
        tl.store(p_partial + o_partial, tl.sum(b_dweight, axis=0).to(tl.float32), mask=o_d < D)
    else:
        _differentiate_tile(
            p_dy, p_x, p_gate, p_rstd, p_dx, p_dgate, b_weight, i_program, T, dy_stride, x_stride, gate_stride, D, BT, BD
        )


@triton.jit
def _reduce_kernel(p_partial, p_dweight, programs, D: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    """p_partial [programs, D] fp32 -> p_dweight [D], BC columns a program."""
    o_p, o_c = tl.arange(0, BP), tl.program_id(0) * BC + tl.arange(0, BC)
    dtype = p_dweight.dtype.element_ty
    m_block = (o_p < programs)[:, None] & (o_c < D)[None, :]
    b_partial = tl.load(p_partial + o_p[:, None] * D + o_c[None, :], mask=m_block, other=0.0)  # [BP, BC]
    tl.store(p_dweight + o_c, tl.sum(_wide(b_partial, dtype), axis=0).to(dtype), mask=o_c < D)


def tiling(D: int, with_dweight: bool) -> dict[str, int]:
    """A tile of whole rows of D, and its warps. T has no say: a row's bits depend on the row alone."""
    elements, a_warp = (TILE_DWEIGHT, ELEMENTS_A_WARP_DWEIGHT) if with_dweight else (TILE, ELEMENTS_A_WARP)
    BD = triton.next_power_of_2(D)
    BT = max(1, (TILE_INTERPRETED if INTERPRETED.value else elements) // BD)
    return {"BT": BT, "BD": BD, "num_warps": min(max(BT * BD // a_warp, 1), 16)}


def stages(tile: dict[str, int], dtype: torch.dtype) -> int:
    """Tiles of dy, x and a third tensor that are in work or on their way at once where dw is wanted."""
    return 1 + min(STAGES - 1, BYTES_AHEAD // (3 * tile["BT"] * tile["BD"] * dtype.itemsize))


def _on_device(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _rows(x: Tensor) -> Tensor:
    """x [..., D] as [T, D] whose columns lie side by side: a view wherever the strides allow one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("isoloss::gated_rms_norm", mutates_args=())
def _forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, rstd = _empty(x), torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, rstd
    rows, gates, D = _rows(x), _rows(gate), x.shape[-1]
    tile, T = tiling(D, False), rows.shape[0]
    with _on_device(x):
        _forward_kernel[(triton.cdiv(T, tile["BT"]),)](
            rows, gates, weight.contiguous(), y, rstd, T, rows.stride(0), gates.stride(0), eps, D=D, **tile
        )
    return y, rstd


@_forward.register_fake
def _(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _empty(x), torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)


@torch.library.custom_op("isoloss::gated_rms_norm_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor, with_dweight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dgate = _empty(x), _empty(gate)
    if x.numel() == 0:
        return dx, dgate, torch.zeros(weight.shape if with_dweight else 0, dtype=weight.dtype, device=x.device)
    dweight = torch.empty(weight.shape if with_dweight else 0, dtype=weight.dtype, device=x.device)
    dy, rows, gates, D = _rows(dy), _rows(x), _rows(gate), x.shape[-1]
    tile = tiling(D, with_dweight)
    tiles = triton.cdiv(rows.shape[0], tile["BT"])
    programs = min(tiles, max(WARPS_DWEIGHT // tile["num_warps"], 1)) if with_dweight else tiles
    partial = torch.empty((programs, D) if with_dweight else 0, dtype=torch.float32, device=x.device)
    with _on_device(x):
        _backward_kernel[(programs,)](
            dy, rows, gates, weight.contiguous(), rstd, dx, dgate, partial, rows.shape[0], tiles,
            dy.stride(0), rows.stride(0), gates.stride(0), D=D, DWEIGHT=with_dweight, STAGES=stages(tile, x.dtype), **tile,
        )  # fmt: skip
        if with_dweight:
            columns = COLUMNS_INTERPRETED if INTERPRETED.value else COLUMNS
            _reduce_kernel[(triton.cdiv(D, columns),)](
                partial, dweight, programs, D=D, BP=triton.next_power_of_2(programs), BC=columns, num_warps=WARPS_REDUCE
            )
    return dx, dgate, dweight


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor, with_dweight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dweight = torch.empty(weight.shape if with_dweight else 0, dtype=weight.dtype, device=x.device)
    return _empty(x), _empty(gate), dweight


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, gate, weight, _ = inputs
    ctx.save_for_backward(x, gate, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy: Tensor | None, _: Tensor | None):
    if dy is None:
        return None, None, None, None
    dx, dgate, dweight = _backward(dy, *ctx.saved_tensors, ctx.needs_input_grad[2])
    return dx, dgate, dweight if ctx.needs_input_grad[2] else None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x, gate [..., D] and weight [D] -> [..., D]: x over its root mean square, times weight, times silu(gate). fp32 inside.

    One dtype (bfloat16, float16 or float32) and one device (CUDA, or CPU in Triton's interpreter); any strides, the result
    is contiguous. Differentiable once in all three; a weight that needs no gradient costs none. Raises ValueError for
    anything else. Source: the output norm of Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464.
    """
    sides = {"x": x, "gate": gate, "weight": weight}
    if x.shape != gate.shape or len({(side.dtype, side.device) for side in sides.values()}) > 1:
        words = ", ".join(f"{key} {list(side.shape)} {side.dtype} on {side.device}" for key, side in sides.items())
        raise ValueError(f"gated_rms_norm: shapes, dtypes and devices must agree: {words}")
    if x.dtype not in DTYPES:
        raise ValueError(f"gated_rms_norm: dtype {x.dtype} is not one of {', '.join(map(str, DTYPES))}")
    if x.ndim == 0 or weight.shape != x.shape[-1:] or not 1 <= weight.numel() <= WIDEST:
        words = f"a weight of their length, 1 to {WIDEST}, not {list(weight.shape)}"
        raise ValueError(f"gated_rms_norm: rows of {list(x.shape)} need {words}")
    return _forward(x, gate, weight, eps)[0]
