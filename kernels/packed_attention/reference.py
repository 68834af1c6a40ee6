"""The reference: the loop's attention over the whole pack, documents kept apart by a mask."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from loop.attention import attend
from loop.delta_net import Pack


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: Pack, window: int | None = None
) -> torch.Tensor:
    """query [B, heads, L, D], key and value [B, kv heads, L, D] -> [B, L, heads, D], scaled by D^-0.5.

    window: how many positions each may see, itself included; None: all of its document up to itself.
    """
    B, _, L, _ = query.shape
    return attend(layer_of(query, key), query, key, value, document_mask(pack, B, L, window))[0]


def document_mask(pack: Pack, B: int, L: int, window: int | None = None) -> torch.Tensor:
    """What each position may see, bool [B, 1, L, L]: its own document, up to itself, within the window."""
    device = pack.cu_seqlens.device
    lengths = torch.tensor(pack.lengths, device=device)
    document = torch.arange(len(lengths), device=device).repeat_interleave(lengths).view(B, 1, L)
    t = torch.arange(L, device=device)
    seen = t[:, None] >= t
    if window is not None:
        seen = seen & (t[:, None] - t < window)
    return (seen & (document[..., None] == document[..., None, :])).view(B, 1, L, L)


def layer_of(query: torch.Tensor, key: torch.Tensor) -> SimpleNamespace:
    """What transformers' attention functions read from the layer that calls them."""
    return SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], is_causal=True)
