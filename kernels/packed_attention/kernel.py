"""Attention within documents, as transformers calls it: one Triton kernel over the flat pack, or documents as rows."""

from __future__ import annotations

import torch
from torch import nn

from loop.attention import attend, by_documents, on_gpu
from loop.delta_net import Pack

NAME = "packed_attention"
HALVES = (torch.bfloat16, torch.float16)
WIDEST = 256  # a head, in the Triton kernel


def attend_within_documents(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    pack: Pack | None = None,
    sliding_window: int | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options,
) -> tuple[torch.Tensor, None]:
    """query [B, heads, L, D], key and value [B, kv heads, L, D] -> ([B, L, heads, D], None).

    In half precision on a GPU it is one Triton kernel over the flat [B * L] positions; elsewhere `by_rows`. Raises
    ValueError without `pack`: there would be nothing to keep documents apart.
    """
    if pack is None:
        raise ValueError("packed_attention needs the pack's boundaries; call the model through loop.model.forward_body")
    if dropout or not fused(query):
        settings = {"scaling": scaling, "dropout": dropout, **options}
        return by_rows(module, query, key, value, pack, sliding_window, **settings)
    from .flash import flash_attention

    B, _, L, _ = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # views of what transformers hands over
    out = flash_attention(q, k, v, pack.starts, pack.ends, scaling, sliding_window)
    return out.unflatten(0, (B, L)), None


def fused(query: torch.Tensor) -> bool:
    """Whether the Triton kernel takes it. In fp32 it would have no tensor cores, and no registers for wide heads."""
    return on_gpu(query) and query.dtype in HALVES and query.shape[-1] <= WIDEST


def by_rows(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pack: Pack,
    sliding_window: int | None = None,
    **options,
) -> tuple[torch.Tensor, None]:
    """The same in PyTorch alone. Documents of about the same length become rows of one causal call; the zeros behind a
    document are later than all of it, so causality hides them."""
    masks = [_window_mask(positions.shape[1], sliding_window, query.device) for positions in pack.groups]
    return by_documents(module, query, key, value, masks, pack, attend, **options)


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """None where plain causality is all, else which of the last `window` positions each may see, [1, 1, L, L]."""
    if window is None or length <= window:
        return None
    t = torch.arange(length, device=device)
    return ((t[:, None] >= t) & (t[:, None] - t < window))[None, None]
