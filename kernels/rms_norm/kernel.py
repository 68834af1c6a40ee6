"""RMSNorm in Triton, alone or with the residual addition before it: kernels, custom ops, autograd, public functions.

With r = (mean(x^2) + eps)^-1/2, n = x r and scale = 1 + w (zero-centred) or w:  y = n scale,  dw = sum over rows of dy n,
dx = r (c - n mean(c n)) with c = dy scale. Behind an addition x is the sum, and the sum's own gradient is added to dx, as is
that of an x which goes on beside its norm.
Backward reads x and r alone; dw is summed first per program, then over programs, in an order that the shape fixes.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

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
def _rstd(b_x, eps, D: tl.constexpr, dtype: tl.constexpr):
    """fp32 [BT] from fp32 [BT, BD]; its error would be that of a whole row."""
    b_mean = tl.sum(_wide(b_x, dtype) * _wide(b_x, dtype), axis=1) / D
    return (1.0 / tl.sqrt(b_mean + eps)).to(tl.float32) if dtype == tl.float32 else tl.rsqrt(b_mean + eps)


@triton.jit
def _scale(p_weight, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, ZERO_CENTRED: tl.constexpr):
    """[BT, BD], every row the same: read as a tile is, and so laid out as a tile is, without a barrier."""
    o_d = tl.broadcast_to(tl.arange(0, BD)[None, :], [BT, BD])
    b_weight = tl.load(p_weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    return 1.0 + b_weight if ZERO_CENTRED else b_weight


@triton.jit
def _forward_kernel(
    p_x, p_residual, p_weight, p_sum, p_y, p_rstd, T, x_stride, residual_stride, eps,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, ZERO_CENTRED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    dtype = p_y.dtype.element_ty
    o_t, o_d, m_t, m_tile = _tile(tl.program_id(0), T, D, BT, BD)
    o_tile = o_t[:, None] * D + o_d[None, :]
    b_scale = _scale(p_weight, D, BT, BD, ZERO_CENTRED)
    b_x = tl.load(p_x + o_t[:, None] * x_stride + o_d[None, :], mask=m_tile, other=0.0).to(tl.float32)  # [BT, BD]
    if ADD:
        b_residual = tl.load(p_residual + o_t[:, None] * residual_stride + o_d[None, :], mask=m_tile, other=0.0)
        b_sum = (b_x + b_residual.to(tl.float32)).to(dtype)
        tl.store(p_sum + o_tile, b_sum, mask=m_tile)
        b_x = b_sum.to(tl.float32)  # the norm sees the rounded sum, as the reference's does
    b_rstd = _rstd(b_x, eps, D, dtype)
    b_normed = b_x * b_rstd[:, None]
    if not ZERO_CENTRED:
        b_normed = b_normed.to(dtype).to(tl.float32)  # where the reference rounds
    tl.store(p_y + o_tile, (b_normed * b_scale).to(dtype), mask=m_tile)
    tl.store(p_rstd + o_t, b_rstd, mask=m_t)  # last: where it is brought into another layout, warps wait for one another


@triton.jit
def _differentiate_tile(
    p_dy, p_dsum, p_x, p_rstd, p_dx, b_scale, i_tile, T, dy_stride, dsum_stride, x_stride,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Writes dx of one tile and returns its dy n, wide [BT, BD], zero where there is no element."""
    dtype = p_dx.dtype.element_ty
    o_t, o_d, m_t, m_tile = _tile(i_tile, T, D, BT, BD)
    b_dy = tl.load(p_dy + o_t[:, None] * dy_stride + o_d[None, :], mask=m_tile, other=0.0).to(tl.float32)
    b_x = tl.load(p_x + o_t[:, None] * x_stride + o_d[None, :], mask=m_tile, other=0.0).to(tl.float32)
    if ADD:  # asked for before the first barrier, so that it comes with the others
        b_dsum = tl.load(p_dsum + o_t[:, None] * dsum_stride + o_d[None, :], mask=m_tile, other=0.0)
    b_rstd = tl.load(p_rstd + o_t, mask=m_t, other=0.0)[:, None]
    b_normed = b_x * b_rstd
    b_c = b_dy * b_scale
    b_mean = (tl.sum(_wide(b_c, dtype) * _wide(b_normed, dtype), axis=1) / D).to(tl.float32)
    b_dx = b_rstd * (b_c - b_normed * b_mean[:, None])
    if ADD:
        b_dx += b_dsum.to(tl.float32)
    tl.store(p_dx + o_t[:, None] * D + o_d[None, :], b_dx.to(dtype), mask=m_tile)
    return _wide(b_dy, dtype) * _wide(b_normed, dtype)


@triton.jit
def _backward_kernel(
    p_dy, p_dsum, p_x, p_weight, p_rstd, p_dx, p_partial, T, tiles, dy_stride, dsum_stride, x_stride,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, ZERO_CENTRED: tl.constexpr, ADD: tl.constexpr,
    DWEIGHT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile a program; with DWEIGHT each of P has every P-th of `tiles`, and p_partial [P, D] takes its share of dw."""
    i_program, o_d = tl.program_id(0), tl.arange(0, BD)
    b_scale = _scale(p_weight, D, BT, BD, ZERO_CENTRED)
    if DWEIGHT:
        b_dweight = _wide(tl.zeros([BT, BD], dtype=tl.float32), p_dx.dtype.element_ty)
        for i_tile in tl.range(i_program, tiles, tl.num_programs(0), num_stages=STAGES):
            b_dweight += _differentiate_tile(
                p_dy, p_dsum, p_x, p_rstd, p_dx, b_scale, i_tile, T, dy_stride, dsum_stride, x_stride, D, BT, BD, ADD
            )
        tl.store(p_partial + i_program.to(tl.int64) * D + o_d, tl.sum(b_dweight, axis=0).to(tl.float32), mask=o_d < D)
    else:
        _differentiate_tile(
            p_dy, p_dsum, p_x, p_rstd, p_dx, b_scale, i_program, T, dy_stride, dsum_stride, x_stride, D, BT, BD, ADD
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


def _run_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, zero_centred: bool) -> list[Tensor]:
    """y, rstd and, behind an addition, the sum."""
    y, rstd, *total = made = _empty_forward(x, residual)
    if x.numel() == 0:
        return made
    rows, D = _rows(x), x.shape[-1]
    tile, T, other = tiling(D, False), rows.shape[0], rows if residual is None else _rows(residual)
    with _on_device(x):
        _forward_kernel[(triton.cdiv(T, tile["BT"]),)](
            rows, other, weight.contiguous(), total[0] if total else y, y, rstd, T, rows.stride(0), other.stride(0), eps,
            D=D, ZERO_CENTRED=zero_centred, ADD=residual is not None, **tile,
        )  # fmt: skip
    return made


def _empty_forward(x: Tensor, residual: Tensor | None) -> list[Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    return [y, rstd] if residual is None else [y, rstd, torch.empty(x.shape, dtype=x.dtype, device=x.device)]


@torch.library.custom_op("isoloss::rms_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, eps: float, zero_centred: bool) -> tuple[Tensor, Tensor]:
    return tuple(_run_forward(x, None, weight, eps, zero_centred))


_forward.register_fake(lambda x, weight, eps, zero_centred: tuple(_empty_forward(x, None)))


@torch.library.custom_op("isoloss::add_rms_norm", mutates_args=())
def _add_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(_run_forward(x, residual, weight, eps, zero_centred))


_add_forward.register_fake(lambda x, residual, weight, eps, zero_centred: tuple(_empty_forward(x, residual)))


@torch.library.custom_op("isoloss::rms_norm_backward", mutates_args=())
def _backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, zero_centred: bool, with_dweight: bool
) -> tuple[Tensor, Tensor]:
    dx, dweight = _empty_backward(x, weight, with_dweight)
    if x.numel() == 0:
        return dx, dweight.zero_()
    dy, rows, D = _rows(dy), _rows(x), x.shape[-1]
    dsum_rows, tile = dy if dsum is None else _rows(dsum), tiling(D, with_dweight)
    tiles = triton.cdiv(rows.shape[0], tile["BT"])
    programs = min(tiles, max(WARPS_DWEIGHT // tile["num_warps"], 1)) if with_dweight else tiles
    partial = torch.empty((programs, D) if with_dweight else 0, dtype=torch.float32, device=x.device)
    with _on_device(x):
        _backward_kernel[(programs,)](
            dy, dsum_rows, rows, weight.contiguous(), rstd, dx, partial, rows.shape[0], tiles,
            dy.stride(0), dsum_rows.stride(0), rows.stride(0),
            D=D, ZERO_CENTRED=zero_centred, ADD=dsum is not None, DWEIGHT=with_dweight, STAGES=stages(tile, x.dtype), **tile,
        )  # fmt: skip
        if with_dweight:
            columns = COLUMNS_INTERPRETED if INTERPRETED.value else COLUMNS
            _reduce_kernel[(triton.cdiv(D, columns),)](
                partial, dweight, programs, D=D, BP=triton.next_power_of_2(programs), BC=columns, num_warps=WARPS_REDUCE
            )
    return dx, dweight


def _empty_backward(x: Tensor, weight: Tensor, with_dweight: bool) -> tuple[Tensor, Tensor]:
    dweight = torch.empty(weight.shape if with_dweight else 0, dtype=weight.dtype, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), dweight


_backward.register_fake(lambda dy, dsum, x, weight, rstd, zero_centred, wanted: _empty_backward(x, weight, wanted))


def _save(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    """For both ops: x, or the sum in its place, rstd and the weight."""
    ctx.save_for_backward(output[2] if len(output) == 3 else inputs[0], inputs[-3], output[1])
    ctx.zero_centred = inputs[-1]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy: Tensor | None, dsum: Tensor | None, with_dweight: bool) -> tuple[Tensor | None, Tensor | None]:
    if dy is None:  # only the sum, or x beside the norm, was used
        return dsum, None
    dx, dweight = _backward(dy, dsum, *ctx.saved_tensors, ctx.zero_centred, with_dweight)
    return dx, dweight if with_dweight else None


def _differentiate(ctx, dy: Tensor | None, _: Tensor | None):
    dx, dweight = _gradients(ctx, dy, None, ctx.needs_input_grad[1])
    return dx, dweight, None, None


def _differentiate_add(ctx, dy: Tensor | None, _: Tensor | None, dsum: Tensor | None):
    dx, dweight = _gradients(ctx, dy, dsum, ctx.needs_input_grad[2])
    return dx, dx, dweight, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
_add_forward.register_autograd(_differentiate_add, setup_context=_save)


class _Beside(torch.autograd.Function):
    """A custom op may not return what it was given; this hands it on, so that all of x's gradient comes to one place."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, zero_centred: bool) -> tuple[Tensor, Tensor]:
        y, rstd = _forward(x, weight, eps, zero_centred)
        ctx.save_for_backward(x, weight, rstd)
        ctx.zero_centred = zero_centred
        ctx.set_materialize_grads(False)
        return y, x

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor | None, dsum: Tensor | None):
        return *_gradients(ctx, dy, dsum, ctx.needs_input_grad[1]), None, None


def _check(name: str, weight: Tensor, **activations: Tensor) -> None:
    """Raises ValueError for what the kernels can't compute."""
    first = next(iter(activations.values()))
    sides = {**activations, "weight": weight}
    if len({(side.dtype, side.device) for side in sides.values()}) > 1 or any(
        side.shape != first.shape for side in activations.values()
    ):
        words = ", ".join(f"{key} {list(side.shape)} {side.dtype} on {side.device}" for key, side in sides.items())
        raise ValueError(f"{name}: shapes, dtypes and devices must agree: {words}")
    if first.dtype not in DTYPES:
        raise ValueError(f"{name}: dtype {first.dtype} is not one of {', '.join(map(str, DTYPES))}")
    if first.ndim == 0 or weight.shape != first.shape[-1:] or not 1 <= weight.numel() <= WIDEST:
        raise ValueError(
            f"{name}: rows of {list(first.shape)} need a weight of their length, 1 to {WIDEST}, not {list(weight.shape)}"
        )


def rms_norm(x: Tensor, weight: Tensor, eps: float, zero_centred: bool) -> Tensor:
    """x [..., D] and weight [D] -> [..., D]: x over its root mean square, times 1 + weight or weight. fp32 inside.

    One dtype (bfloat16, float16 or float32) and one device (CUDA, or CPU in Triton's interpreter); any strides, the result
    is contiguous. Differentiable once in both; a weight that needs no gradient costs none. Raises ValueError for anything
    else. Source: Zhang and Sennrich 2019, arXiv 1910.07467.
    """
    _check("rms_norm", weight, x=x)
    return _forward(x, weight, eps, zero_centred)[0]


def rms_norm_beside(x: Tensor, weight: Tensor, eps: float, zero_centred: bool) -> tuple[Tensor, Tensor]:
    """`rms_norm(x)`, and x itself: whoever takes x from here has its gradient added inside the norm's backward."""
    _check("rms_norm_beside", weight, x=x)
    return _Beside.apply(x, weight, eps, zero_centred)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centred: bool) -> tuple[Tensor, Tensor]:
    """x, residual [..., D] and weight [D] -> (rms_norm(residual + x), residual + x), both [..., D], in one launch.

    The sum is rounded to the dtype before it is normed. Otherwise as `rms_norm`, differentiable in all three.
    """
    _check("add_rms_norm", weight, x=x, residual=residual)
    y, _, total = _add_forward(x, residual, weight, eps, zero_centred)
    return y, total
