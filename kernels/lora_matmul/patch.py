"""Swaps PEFT's LoRA layers for fused ones, and joins those that share an input with each other and with frozen ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from kernels import shared_input
from kernels.swapping import is_watched
from loop.lora import Adapter, adapters

from .kernel import FusedLora, Member, SharedInput, SharingLinear

if TYPE_CHECKING:
    from loop.run import Run

NARROW_COLUMNS = 128  # of a frozen projection, at most: its weight is copied beside the adapters' at every call


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
    """Replaces them, and the narrow frozen projections beside them. The parameters stay the same objects: optimizer, names
    and files do not notice."""
    members: dict[str, Member] = {}
    for adapter in peft_adapters(run.model):
        members[adapter.name] = FusedLora(adapter.base, adapter.a, adapter.b, adapter.scaling, adapter.dropout)
        run.model.set_submodule(adapter.name, members[adapter.name].train(adapter.module.training))
    members |= {name: SharingLinear(run.model.get_submodule(name)) for name in narrow_projections(run.model)}
    for group in groups(members):
        SharedInput([members[name] for name in group])
        for name in group:
            if isinstance(members[name], SharingLinear):
                run.model.set_submodule(name, members[name])


def groups(members: dict[str, Member]) -> list[list[str]]:
    """Names of at least two projections each that hang on one parent and share its input, one of them adapted. In `members`
    adapted ones come first."""
    return [names for names in shared_input.groups(members.items()) if isinstance(members[names[0]], FusedLora)]


def narrow_projections(model: nn.Module) -> list[str]:
    """The projections that might share an input with adapted ones, and are frozen Linears of few columns and nothing more,
    in the model's order."""
    return [
        name
        for name, module in model.named_modules()
        if shared_input.kind(name.rpartition(".")[2]) is not None and _is_narrow(module)
    ]


def _is_narrow(module: nn.Module) -> bool:
    """Whether nobody would notice the swap: it has no bias, trains nothing, and carries no hooks that a swap would lose."""
    if type(module) is not nn.Linear or module.bias is not None or module.weight.requires_grad:
        return False
    return module.out_features <= NARROW_COLUMNS and not is_watched(module)


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
