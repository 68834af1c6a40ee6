"""Swaps the frozen base layers inside PEFT's LoRA layers for e4m3 ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from kernels.swapping import is_watched

from .kernel import Fp8Linear, uses_mma
from .mma import ALIGNED, unavailable

if TYPE_CHECKING:
    from loop.run import Run


def eligible(run: Run) -> str | None:
    """None, or why not: weights that train, another dtype than bf16, no layer for it, or no way to build the kernel."""
    if run.config.method != "lora":
        return "full fine-tuning changes every weight at every step; only a frozen base, LoRA's, is quantised once for all"
    if run.dtype is not torch.bfloat16:
        return f"the run computes in {run.dtype}; products of e4m3 are for runs in torch.bfloat16"
    found = list(_peft_layers(run.model))
    if not found:
        return "the run has no PEFT LoRA layers"
    for name, layer in found:
        reason = _obstacle(layer)
        if reason is not None:
            return f"{name} {reason}; only a frozen Linear under plain LoRA is quantised"
    if not any(_fits(layer.base_layer) for _, layer in found):
        return f"no adapted layer has sizes that are multiples of {ALIGNED}"
    if run.device.type == "cuda" and uses_mma(torch.cuda.get_device_capability(run.device)):
        return unavailable(run.device)
    return None


def apply(run: Run) -> None:
    """Replaces them. Parameters stay the same objects under the same names; a layer whose sizes don't fit stays as it is."""
    for _, layer in list(_peft_layers(run.model)):
        if _fits(layer.base_layer):
            layer.base_layer = Fp8Linear(layer.base_layer)


def _fits(base: nn.Linear) -> bool:
    """Forward runs over `in` and backward over `out`, each in pieces of 16."""
    return base.in_features % ALIGNED == 0 and base.out_features % ALIGNED == 0


def _obstacle(layer: nn.Module) -> str | None:
    """Why the base of a LoRA layer can't be replaced, or None."""
    base = layer.base_layer
    if type(base) is not nn.Linear:
        return f"wraps a {type(base).__name__}, not a Linear"
    if any(parameter.requires_grad for parameter in base.parameters()):
        return "trains its base, too"
    if layer.merged:
        return "is merged into its base weight"
    if layer.lora_variant:
        return f"is of the variant {', '.join(type(variant).__name__ for variant in layer.lora_variant.values())}"
    if is_watched(base):
        return "has hooks on its base, or a forward of its own, which a swap would lose"
    if base.weight.dtype is not torch.bfloat16:
        return f"has its base in {base.weight.dtype}"
    return None


def _peft_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))
