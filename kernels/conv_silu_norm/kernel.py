"""Causal depthwise convolution of four taps, SiLU, split and L2 norm of q and k: custom ops, autograd, public function.

With p[t] = sum over j of w[3 - j] x[t - j] within t's document, a = p sigmoid(p), and for q and k r = (sum a^2 + eps)^-1/2,
y = a r; v is a itself. Backward, with da = r (dy - y sum(dy y)) or dy, and dp = da silu'(p):
dx[t] = sum over j of w[3 - j] dp[t + j] within t's document,  dw[3 - j] = sum over t of dp[t] x[t - j].

Backward reads x, dy and r, and recomputes p. Programs walk down the rows of a head, the last rows of x and dp in registers;
dw is summed first per program, then over programs, in an order that the shape fixes.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import backward, forward, walk

INTERPRETED = walk.INTERPRETED.value
TAPS = 4
MULTIPROCESSORS = 132  # an H100's or H200's, which programs are counted for; a constant, so that no device sums otherwise
REGISTERS_A_MULTIPROCESSOR, MOST_REGISTERS = 1 << 16, 255
FEWEST_ROWS, FEWEST_ROWS_INTERPRETED = 16, 4
TILE_INTERPRETED = 1 << 14  # elements of a program side by side: the interpreter's cost is per program, not per element
COLUMNS = 16  # of the partial sums that one program adds up
WIDEST = 1024  # elements of a head of q or k
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Walk:
    """How programs walk down the rows. One that takes a head of 128 has one warp, so that no sum crosses warps."""

    warps: int  # that are to fit on a multiprocessor at once, which caps a thread's registers
    heads_of_columns: int = 128  # a program takes as many whole heads as fit, and at least one
    columns_a_lane: int = 4
    unroll: int = 4  # rows a step
    stages: int = 1  # steps whose loads are in flight, through shared memory, where more than one

    @property
    def registers(self) -> int:
        """A thread's, at most, which come in eights."""
        return min(REGISTERS_A_MULTIPROCESSOR // (32 * self.warps) // 8 * 8, MOST_REGISTERS)


# By whether sums are fp64, which are twice the registers. As many warps as spill none: they hide each other's latency.
FORWARD = {False: Walk(warps=24), True: Walk(warps=16, unroll=2)}
BACKWARD = {False: Walk(warps=20), True: Walk(warps=8, unroll=2)}
BACKWARD_DWEIGHT = {False: Walk(warps=16), True: Walk(warps=8, unroll=2)}


def tiling(plan: Walk, T: int, HK: int, K: int, VALUES: int) -> dict[str, int]:
    """How a launch shares out the work: `rows` of each chunk of rows, BH heads side by side, in GROUPS. All programs run at
    once, for each reads three rows more than it owns at either end. T decides where programs begin, but no row's bits."""
    v_heads, BD = triton.cdiv(VALUES, K), triton.next_power_of_2(K)
    BH = triton.next_power_of_2(max(HK, v_heads)) if INTERPRETED else max(plan.heads_of_columns // BD, 1)
    of_q = triton.cdiv(HK, BH)
    groups, warps = 2 * of_q + triton.cdiv(v_heads, BH), min(max(BH * BD // (32 * plan.columns_a_lane), 1), 16)
    fewest = FEWEST_ROWS_INTERPRETED if INTERPRETED else FEWEST_ROWS
    rows = max(fewest, triton.cdiv(T * groups, MULTIPROCESSORS * plan.warps // warps))
    rows = triton.cdiv(rows, plan.unroll) * plan.unroll
    fitting = triton.next_power_of_2(triton.cdiv(TILE_INTERPRETED, BH * BD))
    chunks = min(triton.next_power_of_2(triton.cdiv(T, rows)), fitting) if INTERPRETED else 1
    shares = {"rows": rows, "GROUPS_QK": of_q, "GROUPS": groups, "BH": BH, "BD": BD, "CHUNKS": chunks}
    shape = {"UNROLL": plan.unroll, "STAGES": plan.stages, "num_warps": warps, "maxnreg": plan.registers}
    return shares | shape


def forward_tiling(T: int, HK: int, K: int, VALUES: int, dtype: torch.dtype) -> dict[str, int]:
    """`tiling` of a forward launch."""
    return tiling(FORWARD[dtype == torch.float32], T, HK, K, VALUES)


def backward_tiling(T: int, HK: int, K: int, VALUES: int, dtype: torch.dtype, with_dweight: bool) -> dict[str, int]:
    """`tiling` of a backward launch."""
    return tiling((BACKWARD_DWEIGHT if with_dweight else BACKWARD)[dtype == torch.float32], T, HK, K, VALUES)


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
    T, rows = x.shape[0], _rows(x)
    if x.numel() == 0:
        return made
    tile = forward_tiling(T, key_heads, key_width, v.shape[1], x.dtype)
    programs = triton.cdiv(T, tile["rows"] * tile["CHUNKS"]) * tile["GROUPS"]
    with _on_device(x):
        forward.forward_kernel[(programs,)](
            rows, weight.contiguous(), starts.contiguous(), q, k, v, rstd, T, eps=eps, X_STRIDE=rows.stride(0),
            HK=key_heads, K=key_width, VALUES=v.shape[1], **tile,
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
        backward.backward_kernel[(programs * tile["GROUPS"],)](
            rows, weight.contiguous(), starts.contiguous(), rstd, dq.contiguous(), dk.contiguous(), dv.contiguous(), dx,
            partial, T, X_STRIDE=rows.stride(0), HK=HK, K=K, VALUES=values, DWEIGHT=with_dweight, **tile,
        )  # fmt: skip
        if with_dweight:
            backward.reduce_kernel[(triton.cdiv(TAPS * C, COLUMNS),)](
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
