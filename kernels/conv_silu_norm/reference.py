"""The reference: the loop's convolution, the split, and the L2 norm that transformers' delta rule computes first."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from loop.delta_net import Pack, PackedDeltaNet

EPS = 1e-6  # of the delta rule's L2 norm, in transformers and in FLA


def conv_silu_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, pack: Pack, key_heads: int, key_width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [1, T, C], weight [C, 4] -> q, k [1, T, key_heads, key_width] of length 1 a head, v [1, T, the rest of C].

    The convolution is `PackedDeltaNet`'s own method. The norm is fp32, and rounded to x's dtype, as FLA's delta rule rounds
    it; transformers' goes on in fp32.
    """
    layer = SimpleNamespace(conv1d=SimpleNamespace(weight=weight.unsqueeze(1), bias=None), activation="silu")
    keys = key_heads * key_width
    q, k, v = PackedDeltaNet.convolve(layer, x, pack).split([keys, keys, x.shape[-1] - 2 * keys], dim=-1)
    q, k = (_normalised(side.unflatten(-1, (key_heads, key_width))) for side in (q, k))
    return q, k, v


def _normalised(x: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + EPS)).to(x.dtype)
