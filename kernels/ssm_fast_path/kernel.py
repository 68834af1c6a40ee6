"""The gated-delta layer with FLA's convolution and delta rule."""

from __future__ import annotations

import torch
from fla.modules.causal_conv1d import causal_conv1d
from fla.ops.gated_delta_rule import chunk_gated_delta_rule

from loop.delta_net import Pack, PackedDeltaNet


def fla_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    pack: Pack,
    qk_normalized: bool = False,
) -> torch.Tensor:
    """q, k [1, T, key heads, K]; v [1, T, value heads, V]; g (log decay, fp32), beta [1, T, value heads] -> like v.

    bf16 or fp16 on CUDA; q and k are L2-normalised inside, unless they come with length 1 already. Each key head serves
    value heads / key heads of them.
    """
    out, _ = chunk_gated_delta_rule(
        q.contiguous(),  # FLA's autograd expects its inputs dense; here they are slices of one projection
        k.contiguous(),
        v.contiguous(),
        g=g,
        beta=beta,
        use_qk_l2norm_in_kernel=not qk_normalized,
        cu_seqlens=pack.cu_seqlens,
        chunk_indices=pack.chunk_indices,
    )
    return out


class FlaDeltaNet(PackedDeltaNet):
    """As `PackedDeltaNet`, one launch for all documents: both kernels reset at every entry of `cu_seqlens`."""

    def convolve(self, x: torch.Tensor, pack: Pack) -> torch.Tensor:
        out, _ = causal_conv1d(
            x=x,
            weight=self.conv1d.weight.squeeze(1),
            bias=self.conv1d.bias,
            activation=self.activation,
            cu_seqlens=pack.cu_seqlens,
            chunk_indices=pack.chunk_indices,
        )
        return out

    def delta_rule(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, pack: Pack
    ) -> torch.Tensor:
        return fla_delta_rule(q, k, v, g, beta, pack, self.qk_normalized)
