"""Swaps every PEFT LoRA layer of a run for a merged one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.lora_matmul.patch import beyond_plain_lora, peft_adapters

from .kernel import MergedLora

if TYPE_CHECKING:
    from loop.run import Run


def eligible(run: Run) -> str | None:
    """None, or why not: no PEFT LoRA layer, or one whose adapter can't be added to its base's weight."""
    found = peft_adapters(run.model)
    if not found:
        return "the run has no PEFT LoRA layers"
    for adapter in found:
        if adapter.dropout:
            return f"{adapter.name} drops out {adapter.dropout:g} of what its adapter sees; a merged weight sees all of it"
        reason = beyond_plain_lora(adapter)
        if reason is not None:
            return f"{adapter.name} {reason}; only plain LoRA on a frozen base can be merged"
    return None


def apply(run: Run) -> None:
    """Replaces them. The parameters stay the same objects: optimizer, names and files do not notice."""
    for adapter in peft_adapters(run.model):
        merged = MergedLora(adapter.base, adapter.a, adapter.b, adapter.scaling)
        run.model.set_submodule(adapter.name, merged.train(adapter.module.training))
