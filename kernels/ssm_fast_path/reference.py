"""The reference: the loop's delta rule, transformers' own function called on documents kept apart."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from loop.delta_net import Pack, PackedDeltaNet


def delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, pack: Pack
) -> torch.Tensor:
    """q, k [1, T, key heads, K]; v [1, T, value heads, V]; g (log decay, fp32), beta [1, T, value heads] -> like v.

    The method of `PackedDeltaNet` itself, which reads nothing of its layer but the two numbers of heads and whether q and k
    still have to be normalised.
    """
    layer = SimpleNamespace(num_k_heads=k.shape[2], num_v_heads=v.shape[2], qk_normalized=False)
    return PackedDeltaNet.delta_rule(layer, q, k, v, g, beta, pack)
