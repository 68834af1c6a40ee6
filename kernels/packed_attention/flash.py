"""Causal attention within documents in Triton: custom ops, autograd, public function.

The pack is one row of flat positions; for each position it is known where its document begins and ends, on the device, so
nothing here depends on how many documents there are. Backward keeps the output and the logarithms of the softmax's sums.
"""

from __future__ import annotations

import contextlib
import math

import torch
import triton
from torch import Tensor

from . import backward, forward, tiles

INTERPRETED = bool(triton.knobs.runtime.interpret)
DTYPES = (torch.bfloat16, torch.float16, *((torch.float32,) if INTERPRETED else ()))
SUM_TILE, SUM_TILE_INTERPRETED = 2048, 1 << 14  # elements of a program that adds up parts of dk and dv


def _plan(q: Tensor) -> tiles.Plan:
    return tiles.INTERPRETED if INTERPRETED else tiles.plan_for(torch.cuda.get_device_capability(q.device), q.shape[2])


def _on_device(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _columns_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _shape(q: Tensor, k: Tensor, window: int) -> dict[str, int]:
    """What is fixed for a model, for the compiler."""
    (_, H, D), KV = q.shape, k.shape[1]
    return {"H": H, "GROUP": H // KV, "D": D, "BD": tiles.padded(D), "WINDOW": window}


def _options(tile: tiles.Tile) -> dict[str, int]:
    return {"BM": tile.BM, "BN": tile.BN, "num_warps": tile.warps, "num_stages": tile.stages}


def _empty_forward(q: Tensor) -> tuple[Tensor, Tensor]:
    T, H, D = q.shape
    out = torch.empty((T, H, D), dtype=q.dtype, device=q.device)
    return out, torch.empty((H, T), dtype=torch.float32, device=q.device)


@torch.library.custom_op("isoloss::packed_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    out, lse = made = _empty_forward(q)
    if q.numel() == 0:
        return made
    T, (q, k, v), tile = len(q), map(_columns_dense, (q, k, v)), _plan(q).forward
    with _on_device(q):
        forward.forward_kernel[(triton.cdiv(T, tile.BM) * q.shape[1],)](
            q, k, v, out, lse, starts.contiguous(), T, scale * math.log2(math.e),
            *(stride for x in (q, k, v) for stride in x.stride()[:2]), **_shape(q, k, window), **_options(tile),
        )  # fmt: skip
    return made


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor, scale: float, window: int) -> tuple[Tensor, Tensor]:
    return _empty_forward(q)


@torch.library.custom_op("isoloss::packed_attention_backward", mutates_args=())
def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, ends: Tensor, scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dq, dkdv = made = _empty_backward(q, k)
    if q.numel() == 0:
        return made
    T, (do, q, k, v), plan = len(q), map(_columns_dense, (do, q, k, v)), _plan(q)
    shape, tile = _shape(q, k, window), plan.dq
    scales, strides = (scale, scale * math.log2(math.e)), [s for x in (q, k, v, do) for s in x.stride()[:2]]
    delta = torch.empty_like(lse)
    with _on_device(q):
        backward.dq_kernel[(triton.cdiv(T, tile.BM) * shape["H"],)](
            q, k, v, out, do, lse, starts.contiguous(), dq, delta, T, *scales, *strides, **shape, **_options(tile)
        )
        heads = plan.heads_of(shape["GROUP"])
        sums, parts = shape["H"] // heads, shape["GROUP"] // heads
        found = dkdv if parts == 1 else torch.empty((2, T, sums, shape["D"]), dtype=torch.float32, device=q.device)
        for which, tile in plan.dkdv.items():
            backward.dkdv_kernel[(triton.cdiv(T, tile.BN) * sums,)](
                q, k, v, do, lse, delta, ends.contiguous(), *found, T, *scales, *strides,
                HEADS=heads, DK="dk" in which, DV="dv" in which, **shape, **_options(tile),
            )  # fmt: skip
        if parts > 1:
            _add_up(found, dkdv, parts)
    return made


def _add_up(found: Tensor, dkdv: Tensor, parts: int) -> None:
    """found [2, T, KV * parts, D] fp32 into dkdv [2, T, KV, D]."""
    D, rows = dkdv.shape[-1], dkdv.numel() // dkdv.shape[-1]
    BD = tiles.padded(D)
    BR = max((SUM_TILE_INTERPRETED if INTERPRETED else SUM_TILE) // BD, 1)
    backward.sum_kernel[(triton.cdiv(rows, BR),)](found, dkdv, rows, PARTS=parts, D=D, BR=BR, BD=BD)


def _empty_backward(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """dq, and dk and dv in one."""
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty((2, *k.shape), dtype=k.dtype, device=k.device)


@_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, ends: Tensor, scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _empty_backward(q, k)


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, ends, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, starts, ends)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, do: Tensor, _: Tensor | None):
    dq, dkdv = _backward(do, *ctx.saved_tensors, ctx.scale, ctx.window)
    return dq, *dkdv, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    ends: Tensor,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """query [T, H, D], key and value [T, KV, D], starts and ends [T] int32 -> contiguous [T, H, D].

    Position i attends to its document from `starts[i]`, or from i - window + 1 if that is later, up to itself; no document
    reaches beyond `ends[i]`, which is one past the last position of its own. H / KV query heads share a key head; scores are
    scaled by `scale`, D^-0.5 if None. fp32 inside; softmax and score gradients are rounded to the tensors' dtype for their
    products. One dtype (bfloat16 or float16, in Triton's interpreter float32, too), one device, D up to 256; any strides,
    nothing is copied where columns are dense. Differentiable once in query, key and value. Raises ValueError for anything
    else. Source: Dao 2023, FlashAttention-2, arXiv 2307.08691.
    """
    _check_shapes(query, key, value, starts, ends)
    if len({(x.dtype, x.device) for x in (query, key, value)}) > 1 or query.dtype not in DTYPES:
        got = ", ".join(f"{x.dtype} on {x.device}" for x in (query, key, value))
        raise ValueError(f"flash_attention: one device and one of {', '.join(map(str, DTYPES))} are expected, not {got}")
    if starts.dtype != torch.int32 or ends.dtype != torch.int32 or {starts.device, ends.device} != {query.device}:
        raise ValueError(f"flash_attention: starts and ends must be int32 on {query.device}")
    scale = query.shape[2] ** -0.5 if scale is None else scale
    if scale <= 0 or (window is not None and window < 1):
        raise ValueError(f"flash_attention: scale {scale} and window {window} are expected to be positive")
    return _forward(query, key, value, starts, ends, scale, window or 0)[0]


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, ends: Tensor) -> None:
    shapes = ", ".join(str(list(x.shape)) for x in (query, key, value, starts, ends))
    words = f"flash_attention: query, key, value, starts and ends are {shapes}"
    if query.ndim != 3 or key.ndim != 3 or key.shape != value.shape or starts.shape != ends.shape:
        raise ValueError(f"{words}; [T, H, D], twice [T, KV, D] and twice [T] are expected")
    (T, H, D), KV = query.shape, key.shape[1]
    if (key.shape[0], key.shape[2]) != (T, D) or starts.shape != (T,):
        raise ValueError(f"{words}; one T and one D are expected")
    if not 1 <= D <= tiles.WIDEST or KV < 1 or H % KV:
        raise ValueError(f"{words}; KV must divide H, and D be 1 to {tiles.WIDEST}")
