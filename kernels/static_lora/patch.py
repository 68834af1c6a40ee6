"""Swaps every PEFT LoRA layer of a run for a StaticLora."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from loop.lora import Adapter
    from loop.run import Run


def eligible(run: Run) -> str | None:
    """None, or why not: no PEFT LoRA layer, or one that is more than `base(x) + B(A(dropout(x))) * scaling`."""
    found = list(_peft_layers(run.model))
    if not found:
        return "the run has no PEFT LoRA layers"
    reasons = (f"{name} {reason}; only plain LoRA is static" for name, layer in found if (reason := _obstacle(layer)))
    return next(reasons, None)


def apply(run: Run) -> None:
    """Replaces them. The parameters stay the same objects: optimizer, names and files do not notice."""
    from .kernel import StaticLora

    for adapter in _peft_adapters(run.model):
        static = StaticLora(adapter.base, adapter.a, adapter.b, adapter.scaling, adapter.dropout)
        run.model.set_submodule(adapter.name, static.train(adapter.module.training))


def _obstacle(layer: nn.Module) -> str | None:
    """What PEFT's layer does beyond plain LoRA, or None. rsLoRA is plain: PEFT's `scaling` has its factor already."""
    if type(layer.base_layer) is not nn.Linear:
        return f"wraps a {type(layer.base_layer).__name__}, not a Linear"
    if list(layer.active_adapters) != ["default"] or layer.disable_adapters:
        return f"has the adapters {list(layer.active_adapters)} active, not 'default' alone"
    if layer.merged:
        return "is merged into its base weight"
    if layer.lora_variant:
        return f"is of the variant {', '.join(type(v).__name__ for v in layer.lora_variant.values())}"
    products = (layer.lora_A["default"], layer.lora_B["default"])
    if any(product.bias is not None for product in products):
        return "has a bias in its adapter"
    if any(product.weight.dtype != layer.base_layer.weight.dtype for product in products):
        return "has an adapter of another dtype than its base weight"
    return None


def _peft_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _peft_adapters(model: nn.Module) -> list[Adapter]:
    from loop.lora import adapters

    return [adapter for adapter in adapters(model) if isinstance(adapter.module.lora_A, nn.ModuleDict)]
