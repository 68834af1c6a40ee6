"""PEFT's own layer, the reference."""

from __future__ import annotations

import peft
import torch
from torch import nn


def peft_layer(base: nn.Linear, a: torch.Tensor, b: torch.Tensor, alpha: float, dropout: float = 0.0) -> nn.Module:
    """PEFT's lora.Linear around `base` [out, in] with the values a [rank, in] and b [out, rank], in the base's dtype."""
    holder = nn.Sequential(base)
    settings = peft.LoraConfig(r=a.shape[0], lora_alpha=alpha, lora_dropout=dropout, target_modules=["0"])
    layer = peft.inject_adapter_in_model(settings, holder)[0]
    for part, value in ((layer.lora_A, a), (layer.lora_B, b)):
        part["default"].weight.data = value.to(base.weight)
    base.weight.requires_grad_(False)
    return layer
