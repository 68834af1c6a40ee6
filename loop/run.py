"""A run: everything one micro-step needs, with the four seams an optimization may change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from loop.batch import PackedBatch
from loop.config import Config

LossHead = Callable[[nn.Module, torch.Tensor, PackedBatch], torch.Tensor]
MicroStep = Callable[["Run", PackedBatch, int], torch.Tensor]


@dataclass
class Run:
    """A model ready to train.

    The seams: `model`, a transformers causal language model; `loss_head(model, hidden [B, L, D], batch)`, the sum (fp32
    scalar) of the cross-entropy over supervised positions; `micro_step(run, batch, step_supervised_tokens)`,
    forward and backward of one batch, which returns the detached loss sum; `optimizer`.
    """

    config: Config
    device: torch.device
    dtype: torch.dtype
    model: nn.Module
    loss_head: LossHead
    micro_step: MicroStep
    optimizer: Any
    enabled: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)  # optimization -> reason
