"""A LoRA projection without dispatch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class StaticLora(nn.Module):
    """`base(x) + lora_B(lora_A(dropout(x))) * scaling`, PEFT's order of operations.

    PEFT's layer asks on every call which adapters are active, whether they are merged, disabled or of a variant, and casts
    both ways. All of that is fixed here at construction, so a call is four launches with nothing in between and can be
    captured in a CUDA graph. Parameters are shared with the layer it replaces, so files and optimizers see the same ones.
    x [..., in] -> [..., out], in the dtype of the weights.
    """

    def __init__(self, base: nn.Linear, a: nn.Parameter, b: nn.Parameter, scaling: float, dropout: float) -> None:
        super().__init__()
        if not a.dtype == b.dtype == base.weight.dtype:
            raise ValueError(f"adapter dtypes {a.dtype}, {b.dtype} differ from the base's {base.weight.dtype}")
        self.base_layer = base
        self.lora_A = _holder(a)
        self.lora_B = _holder(b)
        self.scaling = scaling
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = F.linear(x, self.base_layer.weight, self.base_layer.bias)
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        return result + F.linear(F.linear(x, self.lora_A.weight), self.lora_B.weight) * self.scaling


def _holder(weight: nn.Parameter) -> nn.Linear:
    """A Linear around an existing parameter, so that its name stays `lora_A.weight`."""
    holder = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    holder.weight = weight
    return holder
