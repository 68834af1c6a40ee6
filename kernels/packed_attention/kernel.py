"""Attention over documents as rows."""

from __future__ import annotations

import torch
from torch import nn

from loop.attention import attend, positions_first
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
    B, _, L, _ = query.shape
    groups = zip(*(pack.split(positions_first(x)) for x in (query, key, value)), strict=True)
    parts = []
    for q, k, v in groups:
        mask = _window_mask(q.shape[1], sliding_window, q.device)
        rows = (x.transpose(1, 2) for x in (q, k, v))  # [documents, heads, chunks * 64, D]
        parts.append(attend(module, *rows, mask, **options)[0])
    return pack.join(parts).unflatten(1, (B, L)).squeeze(0), None


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """None where plain causality is all, else which of the last `window` positions each may see, [1, 1, L, L]."""
    if window is None or length <= window:
        return None
    t = torch.arange(length, device=device)
    return ((t[:, None] >= t) & (t[:, None] - t < window))[None, None]
