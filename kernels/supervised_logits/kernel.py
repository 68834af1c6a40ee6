"""A loss head that gathers supervised positions before the vocabulary product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from loop.batch import IGNORE, PackedBatch

LEAST_ROWS = 64  # fewer, and a CPU's BLAS changes to a matrix-vector product that sums the vocabulary in one long chain


def supervised_rows(hidden: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden [B, L, D] -> the batch's supervised rows [S, D] in order, and their labels, int64 [S].

    Fewer than LEAST_ROWS are filled up with rows whose label is ignored: their loss and gradient are exactly zero. A batch
    that `PackedBatch.to` moved brings its supervised positions along, so nothing here waits for the device.
    """
    rows = batch.supervised_positions
    labels = batch.labels.flatten()
    short = max(min(LEAST_ROWS, labels.numel()) - len(rows), 0)
    labels = F.pad(labels.index_select(0, rows), (0, short), value=IGNORE)
    return hidden.flatten(0, 1).index_select(0, F.pad(rows, (0, short))), labels


def supervised_cross_entropy(model: nn.Module, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """hidden [B, L, D] -> fp32 sum of cross-entropy over the batch's supervised positions, 0 where there are none."""
    kept, labels = supervised_rows(hidden, batch)
    logits = model.get_output_embeddings()(kept).float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
