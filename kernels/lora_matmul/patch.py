"""Swaps PEFT's LoRA layers for fused ones, and joins those that share an input."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from loop.lora import Adapter, adapters

from .kernel import FusedLora, SharedInput

if TYPE_CHECKING:
    from loop.run import Run

# Projections that the models' attention, MLP and gated-delta layers call with one and the same tensor, in turn. That they do
# is what makes sharing pay; where they do not, every call is computed for what it is given.
SHARE_AN_INPUT = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"}),
)


def eligible(run: Run) -> str | None:
    """None, or why not: no PEFT LoRA layer, or one that is more than `base(x) + scaling * B(A(dropout(x)))` on a frozen
    base."""
    found = peft_adapters(run.model)
    if not found:
        return "the run has no PEFT LoRA layers"
    for adapter in found:
        reason = beyond_plain_lora(adapter)
        if reason is not None:
            return f"{adapter.name} {reason}; only plain LoRA on a frozen base is one node"
    return None


def apply(run: Run) -> None:
    """Replaces them. The parameters stay the same objects: optimizer, names and files do not notice."""
    members: dict[str, FusedLora] = {}
    for adapter in peft_adapters(run.model):
        parent, _, attribute = adapter.name.rpartition(".")
        layer = FusedLora(adapter.base, adapter.a, adapter.b, adapter.scaling, adapter.dropout)
        setattr(run.model.get_submodule(parent), attribute, layer.train(adapter.module.training))
        members[adapter.name] = layer
    for group in groups(members):
        SharedInput([members[name] for name in group])


def groups(members: dict[str, FusedLora]) -> list[list[str]]:
    """Names of at least two projections each that hang on one parent and share its input."""
    found: dict[tuple, list[str]] = {}
    for name, layer in members.items():
        parent, _, attribute = name.rpartition(".")
        kind = next((kind for kind in SHARE_AN_INPUT if attribute in kind), None)
        if kind is not None:
            found.setdefault((parent, kind, layer.base_layer.in_features, layer.base_layer.weight.dtype), []).append(name)
    return [names for names in found.values() if len(names) > 1]


def peft_adapters(model: nn.Module) -> list[Adapter]:
    """The adapters whose modules are still PEFT's, in the model's order."""
    from peft.tuners.lora import LoraLayer

    found = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return [adapter for adapter in adapters(model) if adapter.name in found] if found else []


def beyond_plain_lora(adapter: Adapter) -> str | None:
    """What the layer does that a fused one would not, or None. rsLoRA is plain: its factor is in PEFT's `scaling`."""
    layer, base = adapter.module, adapter.base
    if type(base) is not nn.Linear:
        return f"wraps a {type(base).__name__}, not a Linear"
    if any(parameter.requires_grad for parameter in base.parameters()):
        return "trains its base, too"
    if layer.merged:
        return "is merged into its base weight"
    if layer.disable_adapters or list(layer.active_adapters) != ["default"]:
        return f"has the adapters {list(layer.active_adapters)}, of which not just 'default' is active"
    if layer.lora_variant:
        return f"is of the variant {', '.join(type(variant).__name__ for variant in layer.lora_variant.values())}"
    if any(product["default"].bias is not None for product in (layer.lora_A, layer.lora_B)):
        return "has a bias in its adapter"
    dtypes = {str(tensor.dtype) for tensor in (adapter.a, adapter.b, base.weight)}
    return f"has base and adapter in {' and '.join(sorted(dtypes))}" if len(dtypes) > 1 else None
