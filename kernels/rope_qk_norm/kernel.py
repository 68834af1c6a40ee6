"""RMSNorm per head and partial rotary embedding of query and key in one launch: custom ops, autograd, public function.

With r = (mean(x^2) + eps)^-1/2, n = x r, scale = 1 + w (zero-centred) or w, and m = n scale: of the first 2 J columns
y[d] = m[d] cos[d] - m[d + J] sin[d] below J, and m[d] cos[d] + m[d - J] sin[d] above; the other columns are m. Backward,
with c the gradient of y rotated back: dw = sum over rows of c n,  dx = r (c scale - n mean(c scale n)).
Backward reads dy, x and r; dw is summed first per program, then over programs, in an order that the shape fixes.
"""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

from . import device

INTERPRETED = bool(triton.knobs.runtime.interpret)
TILE = 2048  # elements of a program's tile: 16 a thread in 4 warps, two 16-byte loads of bf16
TILE_DWEIGHT = 4096  # larger where partial sums are written, so that there are fewer of them
TILE_INTERPRETED = 1 << 14  # the interpreter's cost is per program, not per element
ELEMENTS_A_WARP = 512
PROGRAMS = 256  # that share the rows where dw is wanted: a constant, so that no device sums in another order
COLUMNS = 16  # of the partial sums that one program adds up
WIDEST = 1 << 12  # elements of a head, which one program holds in registers
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def tiling(D: int, J: int, elements: int) -> dict[str, int]:
    """A tile of about `elements` in whole rows of D, and its warps. T has no say: a row's bits depend on the row alone."""
    G, BJ = triton.next_power_of_2(triton.cdiv(D, J)), triton.next_power_of_2(J)
    BT = max(1, (TILE_INTERPRETED if INTERPRETED else elements) // (G * BJ))
    return {"BT": BT, "J": J, "G": G, "BJ": BJ, "num_warps": min(max(BT * G * BJ // ELEMENTS_A_WARP, 1), 16)}


def _on_device(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _by_position(x: Tensor) -> Tensor:
    """x [B, L, heads, D] as [T, heads, D] whose columns lie side by side: a view wherever the strides allow one."""
    rows = x.flatten(0, 1)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _empty_like(query: Tensor, key: Tensor) -> list[Tensor]:
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key)]


def _empty_forward(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rstd = [torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for x in (query, key)]
    return (*_empty_like(query, key), *rstd)


@torch.library.custom_op("isoloss::rope_qk_norm", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, zero_centred: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = _empty_forward(query, key)
    if query.numel() == 0:
        return made
    q, k, cos, sin = _by_position(query), _by_position(key), cos.contiguous(), sin.contiguous()
    (T, H, D), KV = q.shape, k.shape[1]
    tile = tiling(D, cos.shape[-1] // 2, TILE)
    q_tiles, k_tiles = triton.cdiv(T * H, tile["BT"]), triton.cdiv(T * KV, tile["BT"])
    with _on_device(q):
        device.forward_kernel[(q_tiles + k_tiles,)](
            q, k, q_weight.contiguous(), k_weight.contiguous(), cos, sin, *made, T, q_tiles,
            *q.stride()[:2], *k.stride()[:2], eps, H=H, KV=KV, D=D, ZERO_CENTRED=zero_centred, **tile,
        )  # fmt: skip
    return made


@_forward.register_fake
def _(
    query: Tensor, key: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, zero_centred: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_forward(query, key)


@torch.library.custom_op("isoloss::rope_qk_norm_backward", mutates_args=())
def _backward(
    dq_out: Tensor, dk_out: Tensor, query: Tensor, key: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor,
    sin: Tensor, q_rstd: Tensor, k_rstd: Tensor, zero_centred: bool, with_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dqw, dkw = made = _empty_backward(query, key, q_weight, k_weight, with_dweight)
    if query.numel() == 0:
        return dq, dk, dqw.zero_(), dkw.zero_()
    dq_out, dk_out, q, k = (_by_position(x) for x in (dq_out, dk_out, query, key))
    cos, sin, (T, H, D), KV = cos.contiguous(), sin.contiguous(), q.shape, k.shape[1]
    tile = tiling(D, cos.shape[-1] // 2, TILE_DWEIGHT if with_dweight else TILE)
    q_tiles, k_tiles = triton.cdiv(T * H, tile["BT"]), triton.cdiv(T * KV, tile["BT"])
    tiles = triton.cdiv(q_tiles + k_tiles, PROGRAMS) if with_dweight else 1
    q_programs = triton.cdiv(q_tiles, tiles)
    programs = q_programs + triton.cdiv(k_tiles, tiles)
    partial = torch.empty((programs, D) if with_dweight else 0, dtype=torch.float32, device=q.device)
    with _on_device(q):
        device.backward_kernel[(programs,)](
            dq_out, dk_out, q, k, q_weight.contiguous(), k_weight.contiguous(), cos, sin, q_rstd, k_rstd, dq, dk, partial,
            T, q_programs, tiles, *(stride for x in (dq_out, dk_out, q, k) for stride in x.stride()[:2]),
            H=H, KV=KV, D=D, ZERO_CENTRED=zero_centred, DWEIGHT=with_dweight, **tile,
        )  # fmt: skip
        if with_dweight:
            device.reduce_kernel[(triton.cdiv(D, COLUMNS), 2)](
                partial, dqw, dkw, q_programs, programs, D=D, BP=triton.next_power_of_2(programs), BC=COLUMNS
            )
    return made


def _empty_backward(
    query: Tensor, key: Tensor, q_weight: Tensor, k_weight: Tensor, with_dweight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = [torch.empty(w.shape if with_dweight else 0, dtype=w.dtype, device=w.device) for w in (q_weight, k_weight)]
    return (*_empty_like(query, key), *weights)


@_backward.register_fake
def _(
    dq_out: Tensor, dk_out: Tensor, query: Tensor, key: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor,
    sin: Tensor, q_rstd: Tensor, k_rstd: Tensor, zero_centred: bool, with_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty_backward(query, key, q_weight, k_weight, with_dweight)


def _save(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, _, ctx.zero_centred = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.mark_non_differentiable(*output[2:])


def _differentiate(ctx, dq_out: Tensor, dk_out: Tensor, *_: Tensor | None):
    of_q, of_k = ctx.needs_input_grad[2:4]
    dq, dk, dqw, dkw = _backward(dq_out, dk_out, *ctx.saved_tensors, ctx.zero_centred, of_q or of_k)
    return dq, dk, dqw if of_q else None, dkw if of_k else None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def rope_qk_norm(
    query: Tensor,
    key: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    zero_centred: bool,
) -> tuple[Tensor, Tensor]:
    """query [B, L, H, D], key [B, L, KV, D], weights [D], cos and sin [B, L, R] or [1, L, R] -> both normed and rotated.

    Each head over its root mean square, times 1 + weight or weight; then column d of the first R is rotated with column
    d + R / 2, and the rest stays. fp32 inside, rounded once. One dtype (bfloat16, float16 or float32) and one device (CUDA,
    or CPU in Triton's interpreter); any strides, the results are contiguous. Differentiable once in query, key and weights;
    weights that need no gradient cost none. Raises ValueError for anything else. Sources: Zhang and Sennrich 2019, arXiv
    1910.07467; Su et al. 2021, arXiv 2104.09864, with the halves paired as in GPT-NeoX.
    """
    sides = (query, key, q_weight, k_weight, cos, sin)
    if len({(side.dtype, side.device) for side in sides}) > 1 or query.dtype not in DTYPES:
        words = ", ".join(f"{side.dtype} on {side.device}" for side in sides)
        raise ValueError(f"rope_qk_norm: one device and one of {', '.join(map(str, DTYPES))} are expected, not {words}")
    if query.ndim != 4 or key.ndim != 4 or query.shape[:2] != key.shape[:2] or query.shape[3] != key.shape[3]:
        raise ValueError(f"rope_qk_norm: query {list(query.shape)} and key {list(key.shape)} are not both [B, L, heads, D]")
    (B, L, _, D), R = query.shape, cos.shape[-1]
    if q_weight.shape != (D,) or k_weight.shape != (D,) or not 1 <= D <= WIDEST:
        got = f"{list(q_weight.shape)} and {list(k_weight.shape)}"
        raise ValueError(f"rope_qk_norm: heads of {D} need weights of their length, 1 to {WIDEST}, not {got}")
    if cos.shape != sin.shape or cos.shape not in ((B, L, R), (1, L, R)) or R % 2 or not 2 <= R <= D:
        got = f"{list(cos.shape)} and {list(sin.shape)}"
        raise ValueError(f"rope_qk_norm: cos and sin are {got}; [{B}, {L}, R] with an even R up to {D} is expected")
    cos, sin = (side.expand(B, L, R) for side in (cos, sin))
    return _forward(query, key, q_weight, k_weight, cos, sin, eps, zero_centred)[:2]
