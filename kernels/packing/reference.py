"""The reference: a model's layers on one document a row, padded, as `loop.rows` lays them out."""

from __future__ import annotations

import torch
from torch import nn

from loop.batch import PackedBatch
from loop.model import forward_body
from loop.rows import padded


def padded_layers(model: nn.Module, batch: PackedBatch) -> torch.Tensor:
    """Last hidden states of the documents' own positions [real_tokens, D], in order; batch without padding of its own."""
    out = []
    lengths = iter(batch.lengths)
    for rows in padded(batch):
        hidden = forward_body(model, rows)  # [N, longest, D]
        out += [row[: next(lengths)] for row in hidden]
    return torch.cat(out)
