"""All of the gated delta rule's backward that stays within a chunk, in one kernel.

Per chunk of C positions and value head, with q, k [C, K]; v, v' (new values), do, du (gradient of v') [C, V]; the state h
before the chunk and the gradient dh of the one behind it [K, V]; g summed from the chunk's start in powers of 2; beta [C];
A [C, C], the inverse of the chunk's unit triangular matrix:

    S  = lower(do v'^T 2^(g_i - g_j)) s                      the scores' gradient, diagonal included
    dq = 2^g s do h^T + S k
    dk = 2^(g_C - g) v' dh^T + S^T q                         from states and scores
    dg = rows(dq q) - rows(dk k), at the last position besides: 2^g_C sum(h dh) + sum(the first part of dk times k)
    dw = -du h^T,  X = A^T dw,  Y = A^T du
    D  = -strictly lower(A^T strictly lower(dw (k beta 2^g)^T + du (v beta)^T) A^T 2^(g_i - g_j))
    dv = beta Y
    dk += X beta 2^g + beta D k + D^T (beta k)
    dbeta = rows(X k 2^g) + rows(Y v) + rows((D k) k)
    dg += rows(X k beta 2^g) + rows(E) - columns(E),  E = D (k k^T) beta_i
    dg is summed from the chunk's end

dw and the parts of dg never leave the chip. The first part of dk does, within its program: it is stored where dk goes and
taken back at the end, since registers are too few to hold it meanwhile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PRECISION = tl.constexpr("ieee")  # of products in fp32; narrower ones have one precision
PIECE = tl.constexpr(16)  # rows of a state at a time, where it is only summed
WARPS = 8


@triton.jit
def _decay(g, where):
    """2^(g_i - g_j) where asked for, [C, C]; elsewhere 1."""
    return tl.exp2(tl.where(where, g[:, None] - g[None, :], 0.0))


@triton.jit
def chunk_backward_kernel(
    q, k, v, v_new, do, du, h, dh, a, g, beta, dq, dk, dv, dg, dbeta, bounds, chunks, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One program for a chunk and a value head."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    document, place = tl.load(chunks + 2 * chunk).to(tl.int64), tl.load(chunks + 2 * chunk + 1).to(tl.int64)
    begin, end = tl.load(bounds + document).to(tl.int64), tl.load(bounds + document + 1).to(tl.int64)
    t = begin + place * C + tl.arange(0, C)
    inside = t < end
    c, kk, vv = tl.arange(0, C), tl.arange(0, K), tl.arange(0, V)
    dtype = q.dtype.element_ty
    key_rows = (t[:, None] * H + head // (HV // H)) * K + kk[None, :]
    rows_k = (t[:, None] * HV + head) * K + kk[None, :]
    rows_v = (t[:, None] * HV + head) * V + vv[None, :]
    numbers = t * HV + head
    states = (chunk * HV + head) * K * V + kk[:, None] * V + vv[None, :]
    some = inside[:, None]

    g_own = tl.load(g + numbers, mask=inside, other=0.0)
    last = tl.minimum(begin + place * C + C, end) - 1
    g_last = tl.load(g + last * HV + head, mask=last >= begin + place * C, other=0.0)
    g_own = tl.where(inside, g_own, g_last)  # rows behind the end decay no further, and all else of theirs is zero
    b = tl.load(beta + numbers, mask=inside, other=0.0).to(tl.float32)
    grown = tl.exp2(g_own)
    left = tl.where(inside, tl.exp2(g_last - g_own), 0.0)
    lower, strict = c[:, None] >= c[None, :], c[:, None] > c[None, :]

    # Loaded again wherever it is needed: registers are scarcer than the second level of cache.
    of_last = 0.0
    for piece in tl.static_range(0, K, PIECE):
        part = (chunk * HV + head) * K * V + (piece + tl.arange(0, PIECE))[:, None] * V + vv[None, :]
        of_last += tl.sum(tl.sum(tl.load(h + part).to(tl.float32) * tl.load(dh + part).to(tl.float32), axis=1), axis=0)
    of_last *= tl.exp2(g_last)

    b_do = tl.load(do + rows_v, mask=some, other=0.0)
    scores = tl.dot(b_do, tl.trans(tl.load(v_new + rows_v, mask=some, other=0.0)), input_precision=PRECISION)
    scores = (tl.where(lower, scores * _decay(g_own, lower), 0.0) * scale).to(dtype)
    b_dq = tl.dot(b_do, tl.trans(tl.load(h + states)).to(dtype), input_precision=PRECISION) * (grown * scale)[:, None]
    b_dq = tl.dot(scores, tl.load(k + key_rows, mask=some, other=0.0), b_dq, input_precision=PRECISION)
    b_dg = tl.sum(b_dq * tl.load(q + key_rows, mask=some, other=0.0), axis=1)
    tl.store(dq + rows_k, b_dq.to(dtype), mask=some)

    b_new = tl.load(v_new + rows_v, mask=some, other=0.0)
    b_dk = tl.dot(b_new, tl.trans(tl.load(dh + states)).to(dtype), input_precision=PRECISION) * left[:, None]
    b_k = tl.load(k + key_rows, mask=some, other=0.0)
    of_last += tl.sum(tl.sum(b_dk * b_k, axis=1), axis=0)
    b_dk = tl.dot(tl.trans(scores), tl.load(q + key_rows, mask=some, other=0.0), b_dk, input_precision=PRECISION)
    b_dg += tl.where(t == last, of_last, 0.0) - tl.sum(b_dk * b_k, axis=1)
    tl.store(dk + rows_k, b_dk.to(dtype), mask=some)

    b_du = tl.load(du + rows_v, mask=some, other=0.0).to(dtype)
    turned = tl.trans(tl.load(a + (t[:, None] * HV + head) * C + c[None, :], mask=some, other=0.0))  # [C, C]
    of_u = tl.dot(turned, b_du, input_precision=PRECISION)
    b_v = tl.load(v + rows_v, mask=some, other=0.0)
    b_db = tl.sum(of_u * b_v, axis=1)
    d = tl.dot(b_du, tl.trans((b_v * b[:, None]).to(dtype)), input_precision=PRECISION)
    tl.store(dv + rows_v, (of_u * b[:, None]).to(dtype), mask=some)

    b_dw = (-tl.dot(b_du, tl.trans(tl.load(h + states)).to(dtype), input_precision=PRECISION)).to(dtype)
    of_w = tl.dot(turned, b_dw, input_precision=PRECISION)
    b_k = tl.load(k + key_rows, mask=some, other=0.0)
    through = tl.sum(of_w * b_k, axis=1) * grown
    b_db += through
    b_dg += through * b
    b_dk = of_w * (grown * b)[:, None]
    d = tl.dot(b_dw, tl.trans((b_k * (b * grown)[:, None]).to(dtype)), d, input_precision=PRECISION)
    d = tl.dot(tl.where(strict, d, 0.0).to(dtype), turned, input_precision=PRECISION)
    d = tl.dot(turned, d.to(dtype), input_precision=PRECISION)
    d = tl.where(strict, -d * _decay(tl.load(g + numbers, mask=inside, other=g_last), strict), 0.0).to(dtype)

    of_k = tl.dot(d, b_k, input_precision=PRECISION)
    b_db += tl.sum(of_k * b_k, axis=1)
    b_dk += of_k * b[:, None]
    b_dk = tl.dot(tl.trans(d), (b_k * b[:, None]).to(dtype), b_dk, input_precision=PRECISION)
    tl.debug_barrier()  # the first part of dk may have been stored by other threads
    b_dk += tl.load(dk + rows_k, mask=some, other=0.0).to(tl.float32)
    tl.debug_barrier()
    tl.store(dk + rows_k, b_dk.to(dtype), mask=some)
    tl.store(dbeta + numbers, b_db, mask=inside)
    e = d.to(tl.float32) * tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION) * b[:, None]
    b_dg += tl.sum(e, axis=1) - tl.sum(e, axis=0)
    behind = (c[None, :] >= c[:, None]) & inside[None, :]
    tl.store(dg + numbers, tl.sum(tl.where(behind, b_dg[None, :], 0.0), axis=1), mask=inside)


def chunk_backward(
    q: Tensor, k: Tensor, v: Tensor, v_new: Tensor, g: Tensor, beta: Tensor, a: Tensor, h: Tensor, do: Tensor, dh: Tensor,
    du: Tensor, scale: float, bounds: Tensor, chunks: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk [1, T, H, K] and dv [1, T, HV, V] in the inputs' dtype; dg, dbeta [1, T, HV] in fp32.

    q, k [1, T, H, K]; v, v_new, do, du [1, T, HV, V]; g [1, T, HV] fp32, summed within chunks, in powers of 2; beta
    [1, T, HV]; a [1, T, HV, C]; h, dh [chunks, HV, K, V] (with a 1 in front or without). bounds [N + 1] int32, where
    documents begin; chunks [chunks, 2], document and place in it of each chunk of C positions; those behind a document's
    end are left out. All dense, on one device. K, V and C are powers of 2, at least 16.
    """
    _, T, H, K = k.shape
    HV, V, C = v.shape[2], v.shape[3], a.shape[-1]
    dq, dk = q.new_empty(1, T, HV, K), k.new_empty(1, T, HV, K)
    dv, dg, dbeta = torch.empty_like(v), torch.empty_like(g), torch.empty_like(g)
    chunk_backward_kernel[(len(chunks), HV)](
        q, k, v, v_new, do, du, h, dh, a, g, beta, dq, dk, dv, dg, dbeta, bounds, chunks, scale,
        H, HV, K, V, C, num_warps=WARPS, num_stages=1,
    )  # fmt: skip
    if H != HV:
        dq, dk = (x.view(1, T, H, HV // H, K).sum(3) for x in (dq, dk))
    return dq, dk, dv, dg, dbeta
