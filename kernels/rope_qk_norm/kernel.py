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
# Elements of a program's tile and of a warp's share: 16 a thread, 8 of each half of a row, so that a tensor is two 16-byte
# loads. Where dw is wanted, STAGES - 1 tiles are fetched ahead into shared memory.
TILE, ELEMENTS_A_WARP = 2048, 512
TILE_DWEIGHT, ELEMENTS_A_WARP_DWEIGHT, STAGES = 2048, 512, 3
BYTES_AHEAD = 48 << 10  # of shared memory at most, which every GPU lets a program have
# With a budget ptxas has all loads on their way before it waits for one; left alone it puts some off, to save registers.
REGISTERS = 64
TILE_INTERPRETED = 1 << 15  # the interpreter's cost is per program, not per element
# That share the rows where dw is wanted: a constant, so that no device sums in another order; an H200 runs them all at once.
WARPS_DWEIGHT = 16 * 132
COLUMNS, WARPS_REDUCE = 8, 8  # of the partial sums that one program adds up: 32 bytes of a row; and its warps
WIDEST = 1 << 12  # elements of a head, which one program holds in registers
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def tiling(D: int, J: int, with_dweight: bool) -> dict[str, int]:
    """A tile of whole rows of D, each in two halves, and its warps. T has no say: a row's bits depend on the row alone."""
    elements, a_warp = (TILE_DWEIGHT, ELEMENTS_A_WARP_DWEIGHT) if with_dweight else (TILE, ELEMENTS_A_WARP)
    HALF = J + triton.cdiv(D - 2 * J, 2)
    BH = triton.next_power_of_2(HALF)
    BT = max(1, (TILE_INTERPRETED if INTERPRETED else elements) // (2 * BH))
    together = D | J | HALF
    VEC = min(together & -together, 16)  # the largest power of two that divides all of them
    return {"BT": BT, "J": J, "HALF": HALF, "BH": BH, "VEC": VEC, "num_warps": min(max(BT * 2 * BH // a_warp, 1), 16)}


def budget(tile: dict[str, int], dtype: torch.dtype) -> dict[str, int]:
    """Launch options where dw is not wanted. fp32 tensors, whose sums are fp64, and narrow loads need more registers."""
    return {"maxnreg": REGISTERS} if dtype.itemsize == 2 and tile["VEC"] >= 8 else {}


def stages(tile: dict[str, int], dtype: torch.dtype) -> int:
    """Tiles of gradient, heads, cosine and sine that are in work or on their way at once where dw is wanted."""
    return 1 + min(STAGES - 1, BYTES_AHEAD // (4 * tile["BT"] * 2 * tile["BH"] * dtype.itemsize))


def _shares(q_tiles: int, k_tiles: int, warps: int) -> tuple[int, int]:
    """Programs that share the query's tiles and programs that share the key's, where dw is wanted."""
    programs = max(WARPS_DWEIGHT // warps, 2)
    of_query = min(max(programs * q_tiles // (q_tiles + k_tiles), 1), programs - 1)
    return min(of_query, q_tiles), min(programs - of_query, k_tiles)


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
    tile = tiling(D, cos.shape[-1] // 2, False)
    q_tiles, k_tiles = triton.cdiv(T * H, tile["BT"]), triton.cdiv(T * KV, tile["BT"])
    with _on_device(q):
        device.forward_kernel[(q_tiles + k_tiles,)](
            q, k, q_weight.contiguous(), k_weight.contiguous(), cos, sin, *made, T, q_tiles,
            *q.stride()[:2], *k.stride()[:2], eps,
            H=H, KV=KV, D=D, ZERO_CENTRED=zero_centred, **tile, **budget(tile, q.dtype),
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
    tile = tiling(D, cos.shape[-1] // 2, with_dweight)
    tiles = triton.cdiv(T * H, tile["BT"]), triton.cdiv(T * KV, tile["BT"])
    q_programs, k_programs = _shares(*tiles, tile["num_warps"]) if with_dweight else tiles
    programs = q_programs + k_programs
    options = {} if with_dweight else budget(tile, q.dtype)
    partial = torch.empty((programs, D) if with_dweight else 0, dtype=torch.float32, device=q.device)
    with _on_device(q):
        device.backward_kernel[(programs,)](
            dq_out, dk_out, q, k, q_weight.contiguous(), k_weight.contiguous(), cos, sin, q_rstd, k_rstd, dq, dk, partial,
            T, *tiles, q_programs, k_programs,
            *(stride for x in (dq_out, dk_out, q, k) for stride in x.stride()[:2]),
            H=H, KV=KV, D=D, ZERO_CENTRED=zero_centred, DWEIGHT=with_dweight, STAGES=stages(tile, q.dtype),
            **tile, **options,
        )  # fmt: skip
        if with_dweight:
            device.reduce_kernel[(triton.cdiv(D, COLUMNS), 2)](
                partial, dqw, dkw, q_programs, programs,
                D=D, BP=triton.next_power_of_2(programs), BC=COLUMNS, num_warps=WARPS_REDUCE,
            )  # fmt: skip
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
