"""The reference: the MLP of every position, of which the supervised ones are looked at."""

from __future__ import annotations

import torch
from torch import nn


def mlp_then_rows(mlp: nn.Module, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """mlp(x) [B, L, D] at the flat positions `rows` [S]: [S, D]."""
    return mlp(x).flatten(0, 1).index_select(0, rows)
