"""Causal depthwise convolution of four taps, SiLU, split and L2 norm of q and k: custom ops, autograd, public function.

With p[t] = sum over j of w[3 - j] x[t - j] within t's document, a = p sigmoid(p), and for q and k r = (sum a^2 + eps)^-1/2,
y = a r; v is a itself. Backward, with da = r (dy - y sum(dy y)) or dy, and dp = da silu'(p):
dx[t] = sum over j of w[3 - j] dp[t + j] within t's document,  dw[3 - j] = sum over t of dp[t] x[t - j].

Backward reads x, dy and r, and recomputes p. A program walks down the rows of a few heads, the last rows of x and dp in
registers; dw is summed first per program, then over programs, in an order that the shape fixes.
"""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

from . import device

INTERPRETED = device.INTERPRETED.value
TAPS = 4
TILE = 2048  # elements of a forward program's tile: 16 a thread in 4 warps, two 16-byte loads of bf16
TILE_INTERPRETED = 1 << 14  # the interpreter's cost is per program, not per element
ELEMENTS_A_WARP = 512
HEADS = 4  # whose rows a backward program walks down side by side
# 8 a thread, one 16-byte load: a thread keeps windows of x and dp, weights and dw. Half for fp32, whose sums are in fp64.
ROW_A_WARP = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 128}
# Backward programs that share the rows: what fits on 132 multiprocessors at once, for a walk has a long tail. Constants, so
# that no device sums in another order. A program computes three rows more than it owns, so it owns not too few.
PROGRAMS, PROGRAMS_DWEIGHT = 896, 640
# A thread's, at most: 7 and 5 programs of two warps fit on a multiprocessor. Uncapped, ptxas takes more, and fewer fit.
REGISTERS, REGISTERS_DWEIGHT = 144, 192
REGISTERS_A_BLOCK = 1 << 16
FEWEST_ROWS, FEWEST_ROWS_INTERPRETED = 16, 4
COLUMNS = 16  # of the partial sums that one program adds up
WIDEST = 1024  # elements of a head of q or k
DTYPES = tuple(ROW_A_WARP)


def forward_tiling(K: int) -> dict[str, int]:
    """Rows and columns of a forward program's tile, and its warps. T has no say: a row's bits are its document's alone."""
    BD = triton.next_power_of_2(K)
    BT = max(1, (TILE_INTERPRETED if INTERPRETED else TILE) // BD)
    return {"BT": BT, "BD": BD, "num_warps": min(max(BT * BD // ELEMENTS_A_WARP, 1), 16)}


def backward_tiling(T: int, HK: int, K: int, VALUES: int, dtype: torch.dtype, with_dweight: bool) -> dict[str, int]:
    """How a backward launch shares out the work: `rows` that each chunk of rows owns, BH heads side by side, in GROUPS."""
    v_heads = triton.cdiv(VALUES, K)
    BH, BD = triton.next_power_of_2(max(HK, v_heads)) if INTERPRETED else HEADS, triton.next_power_of_2(K)
    of_q = triton.cdiv(HK, BH)
    groups = 2 * of_q + triton.cdiv(v_heads, BH)
    fewest = FEWEST_ROWS_INTERPRETED if INTERPRETED else FEWEST_ROWS
    rows = max(fewest, triton.cdiv(T * groups, PROGRAMS_DWEIGHT if with_dweight else PROGRAMS))
    fitting = triton.next_power_of_2(triton.cdiv(TILE_INTERPRETED, BH * BD))
    chunks = min(triton.next_power_of_2(triton.cdiv(T, rows)), fitting) if INTERPRETED else 1
    warps = min(max(BH * BD // ROW_A_WARP[dtype], 1), 16)
    registers = min(REGISTERS_DWEIGHT if with_dweight else REGISTERS, REGISTERS_A_BLOCK // (32 * warps))
    shares = {"rows": rows, "GROUPS_QK": of_q, "GROUPS": groups, "BH": BH, "BD": BD, "CHUNKS": chunks}
    return shares | {"num_warps": warps, "maxnreg": registers}


def _on_device(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _rows(x: Tensor) -> Tensor:
    """x [T, C] with columns that lie side by side: itself, such as a slice of a wider projection, or a copy."""
    return x if x.stride(1) == 1 else x.contiguous()


def _empty_forward(x: Tensor, key_heads: int, key_width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k [T, key heads, key_width], v [T, value columns] and r [T, 2 key heads]."""
    T, values = x.shape[0], x.shape[1] - 2 * key_heads * key_width
    q, k = (torch.empty((T, key_heads, key_width), dtype=x.dtype, device=x.device) for _ in range(2))
    v = torch.empty((T, values), dtype=x.dtype, device=x.device)
    return q, k, v, torch.empty((T, 2 * key_heads), dtype=torch.float32, device=x.device)


@torch.library.custom_op("isoloss::conv_silu_norm", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, starts: Tensor, key_heads: int, key_width: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, rstd = made = _empty_forward(x, key_heads, key_width)
    (T, C), rows = x.shape, _rows(x)
    if x.numel() == 0:
        return made
    tile, blocks = forward_tiling(key_width), triton.cdiv(C, key_width)
    with _on_device(x):
        device.forward_kernel[(triton.cdiv(T, tile["BT"]) * blocks,)](
            rows, weight.contiguous(), starts.contiguous(), q, k, v, rstd, T, rows.stride(0), eps,
            HK=key_heads, K=key_width, VALUES=v.shape[1], BLOCKS=blocks, **tile,
        )  # fmt: skip
    return made


@_forward.register_fake
def _(
    x: Tensor, weight: Tensor, starts: Tensor, key_heads: int, key_width: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_forward(x, key_heads, key_width)


@torch.library.custom_op("isoloss::conv_silu_norm_backward", mutates_args=())
def _backward(
    dq: Tensor, dk: Tensor, dv: Tensor, x: Tensor, weight: Tensor, starts: Tensor, rstd: Tensor, with_dweight: bool
) -> tuple[Tensor, Tensor]:
    dx, dweight = _empty_backward(x, weight, with_dweight)
    if x.numel() == 0:
        return dx, dweight.zero_()
    (T, C), (_, HK, K), values = x.shape, dq.shape, dv.shape[1]
    rows = _rows(x)
    tile = backward_tiling(T, HK, K, values, x.dtype, with_dweight)
    programs = triton.cdiv(T, tile["rows"] * tile["CHUNKS"])
    chunks = programs * tile["CHUNKS"]
    partial = torch.empty((chunks, TAPS, C) if with_dweight else 0, dtype=torch.float32, device=x.device)
    with _on_device(x):
        device.backward_kernel[(programs * tile["GROUPS"],)](
            rows, weight.contiguous(), starts.contiguous(), rstd, dq.contiguous(), dk.contiguous(), dv.contiguous(), dx,
            partial, T, x_stride=rows.stride(0), HK=HK, K=K, VALUES=values, DWEIGHT=with_dweight, **tile,
        )  # fmt: skip
        if with_dweight:
            device.reduce_kernel[(triton.cdiv(TAPS * C, COLUMNS),)](
                partial, dweight, chunks, C=C, BP=triton.next_power_of_2(chunks), BC=COLUMNS
            )
    return dx, dweight


def _empty_backward(x: Tensor, weight: Tensor, with_dweight: bool) -> tuple[Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, torch.empty(weight.shape if with_dweight else 0, dtype=weight.dtype, device=x.device)


@_backward.register_fake
def _(
    dq: Tensor, dk: Tensor, dv: Tensor, x: Tensor, weight: Tensor, starts: Tensor, rstd: Tensor, with_dweight: bool
) -> tuple[Tensor, Tensor]:
    return _empty_backward(x, weight, with_dweight)


def _save(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, weight, starts, *_ = inputs
    ctx.save_for_backward(x, weight, starts, output[3])
    ctx.mark_non_differentiable(output[3])


def _differentiate(ctx, dq: Tensor, dk: Tensor, dv: Tensor, _: Tensor | None):
    dx, dweight = _backward(dq, dk, dv, *ctx.saved_tensors, ctx.needs_input_grad[1])
    return dx, dweight if ctx.needs_input_grad[1] else None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def conv_silu_norm(
    x: Tensor, weight: Tensor, starts: Tensor, key_heads: int, key_width: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, C], weight [C, 4], starts [T] int32 -> q, k [T, key_heads, key_width] of length 1 a head, v [T, the rest of C].

    Column by column a causal convolution that sees nothing before the row's entry of `starts`, where its document begins;
    then SiLU; the first columns are q's heads, the next k's, and each is divided by the root of eps plus its squares' sum.
    fp32 inside, rounded once. x and weight have one dtype (bfloat16, float16 or float32); all on one device (CUDA, or CPU
    in Triton's interpreter); any strides, the results are contiguous. Differentiable once in x and weight; a weight that
    needs no gradient costs none. Raises ValueError for anything else. Source: the delta rule's inputs in Yang, Kautz and
    Hatamizadeh 2024, arXiv 2412.06464.
    """
    if x.ndim != 2 or weight.shape != (x.shape[1], TAPS) or starts.shape != x.shape[:1]:
        got = f"{list(x.shape)}, {list(weight.shape)} and {list(starts.shape)}"
        raise ValueError(f"conv_silu_norm: x, weight and starts are {got}; [T, C], [C, {TAPS}] and [T] are expected")
    if x.dtype not in DTYPES or weight.dtype != x.dtype or starts.dtype != torch.int32:
        words = f"x is {x.dtype}, weight {weight.dtype} and starts {starts.dtype}; int32 starts are expected"
        raise ValueError(f"conv_silu_norm: {words}, and one of {', '.join(map(str, DTYPES))}")
    if weight.device != x.device or starts.device != x.device:
        raise ValueError(f"conv_silu_norm: one device is expected: {x.device}, {weight.device}, {starts.device}")
    if not 1 <= key_width <= WIDEST or key_heads < 1 or 2 * key_heads * key_width > x.shape[1]:
        words = f"two times {key_heads} heads of {key_width} don't fit into {x.shape[1]} columns"
        raise ValueError(f"conv_silu_norm: {words}, or a head is not 1 to {WIDEST} wide")
    q, k, v, _ = _forward(x, weight, starts, key_heads, key_width, eps)
    return q, k, v
