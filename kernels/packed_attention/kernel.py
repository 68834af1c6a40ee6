"""Attention over documents as rows."""

from __future__ import annotations

import torch
from torch import nn

from loop.attention import attend, by_documents
from loop.delta_net import Pack

NAME = "packed_attention"


def attend_within_documents(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    pack: Pack | None = None,
    sliding_window: int | None = None,
    **options,
) -> tuple[torch.Tensor, None]:
    """query [B, heads, L, D], key and value [B, kv heads, L, D] -> ([B, L, heads, D], None).

    Documents of about the same length become rows of one causal call; the zeros behind a document are later than all of
    it, so causality hides them. Raises ValueError without `pack`: there would be nothing to keep documents apart.
    """
    if pack is None:
        raise ValueError("packed_attention needs the pack's boundaries; call the model through loop.model.forward_body")
    masks = [_window_mask(positions.shape[1], sliding_window, query.device) for positions in pack.groups]
    return by_documents(module, query, key, value, masks, pack, attend, **options)


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """None where plain causality is all, else which of the last `window` positions each may see, [1, 1, L, L]."""
    if window is None or length <= window:
        return None
    t = torch.arange(length, device=device)
    return ((t[:, None] >= t) & (t[:, None] - t < window))[None, None]
