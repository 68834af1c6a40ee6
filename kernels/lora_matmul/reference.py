"""The reference: PEFT's own layers, one call each."""

from __future__ import annotations

from collections.abc import Sequence

import peft
import torch
from torch import nn


def peft_layers(
    bases: Sequence[nn.Linear], a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], alpha: float, dropout: float = 0.0
) -> nn.ModuleList:
    """A PEFT lora.Linear around every base [out_i, in], with the values a[i] [rank, in] and b[i] [out_i, rank] in the base's
    dtype. The bases are frozen."""
    settings = peft.LoraConfig(r=a[0].shape[0], lora_alpha=alpha, lora_dropout=dropout, target_modules=r"\d+")
    layers = peft.inject_adapter_in_model(settings, nn.ModuleList(bases))
    for layer, own_a, own_b in zip(layers, a, b, strict=True):
        layer.base_layer.requires_grad_(False)
        layer.lora_A["default"].weight.data = own_a.to(layer.base_layer.weight)
        layer.lora_B["default"].weight.data = own_b.to(layer.base_layer.weight)
    return layers
