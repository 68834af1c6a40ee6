"""The candidate: the rows of a batch as one row, documents where they were."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels.packed_attention.reference import masked_attention
from kernels.packing.kernel import joined
from loop.batch import PackedBatch
from loop.delta_net import Pack
from loop.model import plain_micro_step

if TYPE_CHECKING:
    from loop.run import Run


def joined_micro_step(run: Run, batch: PackedBatch, step_supervised_tokens: int) -> torch.Tensor:
    """`plain_micro_step` of all packs of the batch as one."""
    return plain_micro_step(run, joined([batch]), step_supervised_tokens)


def joined_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: Pack) -> torch.Tensor:
    """query [B, heads, L, D], key and value [B, kv heads, L, D] -> [B, L, heads, D], in one row of B * L."""
    B, _, L, _ = query.shape
    one = (x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key, value))
    return masked_attention(*one, pack).unflatten(1, (B, L)).squeeze(0)
