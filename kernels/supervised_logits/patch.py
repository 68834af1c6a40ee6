"""A loss head that gathers supervised positions before the vocabulary product."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from loop.batch import PackedBatch
from loop.model import cross_entropy_head

if TYPE_CHECKING:
    from loop.run import Run


def eligible(run: Run) -> str | None:
    if run.loss_head is not cross_entropy_head:
        return "another optimization already owns the loss head"
    return None


def apply(run: Run) -> None:
    run.loss_head = supervised_cross_entropy


def supervised_cross_entropy(model: nn.Module, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """hidden [B, L, D] -> fp32 sum of cross-entropy over the batch's supervised positions."""
    rows = batch.supervised_positions
    kept = hidden.flatten(0, 1).index_select(0, rows)  # [supervised, D]
    logits = model.get_output_embeddings()(kept).float()
    return F.cross_entropy(logits, batch.labels.flatten().index_select(0, rows), reduction="sum")
