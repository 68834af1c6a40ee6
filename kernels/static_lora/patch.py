"""Swaps every PEFT LoRA layer of a run for a StaticLora."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from loop.run import Run


def eligible(run: Run) -> str | None:
    found = [adapter for adapter in _peft_adapters(run)]
    if not found:
        return "the run has no PEFT LoRA layers"
    variants = [a.name for a in found if getattr(a.module, "lora_variant", None) or getattr(a.module, "merged", False)]
    if variants:
        return f"{variants[0]} is a merged adapter or a LoRA variant; only plain LoRA is static"
    biased = [a.name for a in found if any(getattr(m, "bias", None) is not None for m in _products(a.module))]
    if biased:
        return f"{biased[0]} has a bias in its adapter; only plain LoRA is static"
    return None


def apply(run: Run) -> None:
    from kernels.static_lora.kernel import StaticLora

    for adapter in list(_peft_adapters(run)):
        parent, _, name = adapter.name.rpartition(".")
        static = StaticLora(adapter.base, adapter.a, adapter.b, adapter.scaling, adapter.dropout)
        setattr(run.model.get_submodule(parent), name, static.train(adapter.module.training))


def _peft_adapters(run: Run):
    from loop.lora import adapters

    return (adapter for adapter in adapters(run.model) if isinstance(adapter.module.lora_A, nn.ModuleDict))


def _products(module: nn.Module) -> list[nn.Module]:
    return [*module.lora_A.values(), *module.lora_B.values()]
