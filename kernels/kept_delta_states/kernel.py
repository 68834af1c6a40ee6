"""The gated delta rule by FLA's own kernels, called one by one, and none of them a second time in backward.

In chunks of 64, with w and u the keys and values under the inverse of a chunk's triangular matrix A:

    forward:   g summed within chunks; w, u, A; states h before every chunk, and new values u - w h; output
    backward:  dv within chunks; dh and dv across them, last chunk first; dq, dk, dw, dg; from dw and dv dk, dv, dbeta, dg

FLA's autograd function keeps A, and makes w, u, h and the new values again in backward: two of the eight kernels there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from fla.modules.norm.l2norm import l2norm_bwd, l2norm_fwd
from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_bwd_dhu, chunk_gated_delta_rule_fwd_h
from fla.ops.common.chunk_o import chunk_bwd_dqkwg, chunk_bwd_dv_local, chunk_fwd_o
from fla.ops.gated_delta_rule.chunk_fwd import chunk_gated_delta_rule_fwd_intra
from fla.ops.gated_delta_rule.wy_fast import prepare_wy_repr_bwd
from fla.ops.utils import chunk_local_cumsum
from fla.ops.utils.constant import RCP_LN2
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.ssm_fast_path.kernel import FlaDeltaNet
from loop.delta_net import CHUNK, Pack


class Saved(NamedTuple):
    """What backward reads: q, k [1, T, H, K], v, v_new [1, T, HV, V], g (summed within chunks), beta [1, T, HV], w
    [1, T, HV, K], A [1, T, HV, 64], h [1, chunks, HV, K, V], cu_seqlens, and document and place of every chunk."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    w: Tensor
    A: Tensor
    h: Tensor
    v_new: Tensor
    cu_seqlens: Tensor
    chunks: Tensor


# Of what was saved, do, dh, dv (across chunks) and the scale makes dq, dk, dv, dg and dbeta.
WithinChunks = Callable[[Saved, Tensor, Tensor, Tensor, float], tuple[Tensor, ...]]


def by_fla(saved: Saved, do: Tensor, dh: Tensor, dv: Tensor, scale: float) -> tuple[Tensor, ...]:
    q, k, v, g, beta, w, A, h, v_new, cu_seqlens, chunks = saved
    at = {"cu_seqlens": cu_seqlens, "chunk_indices": chunks}
    where = at | {"chunk_size": CHUNK}
    dq, dk, dw, dg = chunk_bwd_dqkwg(q=q, k=k, v=v_new, w=w, g=g, h=h, dv=dv, do=do, dh=dh, scale=scale, **where)
    of_k, dv, db, of_g = prepare_wy_repr_bwd(k=k, v=v, beta=beta, g=g, A=A, dw=dw, du=dv, **at)
    return dq, dk.add_(of_k), dv, chunk_local_cumsum(dg.add_(of_g), reverse=True, **where), db


def kept_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, pack: Pack, qk_normalized: bool = False,
    within: WithinChunks = by_fla,
) -> Tensor:  # fmt: skip
    """q, k [1, T, key heads, K]; v [1, T, value heads, V]; g (log decay, fp32), beta [1, T, value heads] -> like v.

    bf16 or fp16 on CUDA; q and k are L2-normalised inside, unless they come with length 1 already. Each key head serves
    value heads / key heads of them. Kept for backward beside the inputs: w and the new values, each like v, a K x V state
    for every chunk and value head, and 64 numbers a position and value head, in the dtype of the inputs. within: the part
    of backward that stays within chunks.
    """
    return _KeptDeltaRule.apply(q, k, v, g, beta, pack.cu_seqlens, pack.chunk_indices, qk_normalized, within)


class _KeptDeltaRule(torch.autograd.Function):
    """Inputs are made dense first, since FLA's kernels expect that."""

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor, chunks: Tensor, normalized: bool,
        within: WithinChunks,
    ) -> Tensor:  # fmt: skip
        q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g, beta))
        ctx.dtypes = [x.dtype for x in (q, k, v, g, beta)]
        ctx.scale, ctx.within, lengths = k.shape[-1] ** -0.5, within, ()
        where = {"cu_seqlens": cu_seqlens, "chunk_indices": chunks, "chunk_size": CHUNK}
        with torch.cuda.device(q.device):
            if not normalized:
                (q, q_length), (k, k_length) = l2norm_fwd(q), l2norm_fwd(k)
                lengths = (q_length, k_length)
            g = chunk_local_cumsum(g, scale=RCP_LN2, **where)
            w, u, A = chunk_gated_delta_rule_fwd_intra(k=k, v=v, g=g, beta=beta, **where)
            h, v_new, _ = chunk_gated_delta_rule_fwd_h(k=k, w=w, u=u, g=g, **where)
            out = chunk_fwd_o(q=q, k=k, v=v_new, h=h, g=g, scale=ctx.scale, **where)
        ctx.save_for_backward(*Saved(q, k, v, g, beta, w, A, h, v_new, cu_seqlens, chunks), *lengths)
        return out.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, do: Tensor):
        kept = ctx.saved_tensors  # once: what was checkpointed may be unpacked no second time
        saved, lengths = Saved(*kept[: len(Saved._fields)]), kept[len(Saved._fields) :]
        q, k, g, do, scale = saved.q, saved.k, saved.g, do.contiguous(), ctx.scale
        where = {"cu_seqlens": saved.cu_seqlens, "chunk_indices": saved.chunks, "chunk_size": CHUNK}
        with torch.cuda.device(q.device):
            dv = chunk_bwd_dv_local(q=q, k=k, g=g, do=do, scale=scale, **where)
            dh, _, dv = chunk_gated_delta_rule_bwd_dhu(q=q, k=k, w=saved.w, g=g, do=do, dv=dv, scale=scale, **where)
            dq, dk, dv, dg, db = ctx.within(saved, do, dh, dv, scale)
            if lengths:
                dq, dk = l2norm_bwd(q, lengths[0], dq), l2norm_bwd(k, lengths[1], dk)
        gradients = (x.to(dtype) for x, dtype in zip((dq, dk, dv, dg, db), ctx.dtypes, strict=True))
        return *gradients, None, None, None, None


class KeptDeltaNet(FlaDeltaNet):
    """As `FlaDeltaNet`, whose convolution it has; `kept_delta_rule` in place of FLA's autograd function."""

    def delta_rule(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, pack: Pack) -> Tensor:
        return kept_delta_rule(q, k, v, g, beta, pack, self.qk_normalized)
