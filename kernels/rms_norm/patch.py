"""Swaps every RMSNorm of a transformers model, and Qwen3.5's decoder layers for ones that fuse an addition."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING

import torch
from torch import nn

from kernels.norms import epsilon, is_one_weight, no_kernel_for, of_another_dtype

from .reference import rms_norm_reference

if TYPE_CHECKING:
    from loop.run import Run

WIDEST = 1 << 16  # the kernel's limit
DECODER_LAYER, LAYER_NORMS = "Qwen3_5DecoderLayer", ("input_layernorm", "post_attention_layernorm")


class FusedRMSNorm(nn.Module):
    """x [..., D] -> [..., D] over its root mean square, times 1 + weight or weight, with the parameter of the norm that it
    replaces. Called with a residual it returns the norm of residual + x, and that sum; with beside, the norm of x, and x."""

    def __init__(self, weight: nn.Parameter, eps: float, zero_centred: bool):
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.zero_centred = zero_centred

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, beside: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        from .kernel import add_rms_norm, rms_norm, rms_norm_beside

        if residual is None:
            return (rms_norm_beside if beside else rms_norm)(x, self.weight, self.eps, self.zero_centred)
        return add_rms_norm(x, residual, self.weight, self.eps, self.zero_centred)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}, zero_centred={self.zero_centred}"


def form_of(module: nn.Module) -> bool | None:
    """True for a zero-centred RMSNorm, False for a plain one, None for anything else.

    The structure must be right (one weight and an epsilon, nothing of its own, no hooks that a swap would lose), and so must
    the behaviour: the forward is run on known values, whose bits in fp32 and bf16 tell where it rounds and what it adds.
    """
    if not is_one_weight(module):
        return None
    weight, eps = module.weight, epsilon(module)
    if weight is None or weight.ndim != 1 or not 1 <= weight.numel() <= WIDEST or eps is None:
        return None
    if len(inspect.signature(type(module).forward).parameters) != 2:
        return None
    matching = [form for form in (True, False) if _behaves(module, eps, zero_centred=form)]
    return matching[0] if matching else None


def _behaves(module: nn.Module, eps: float, zero_centred: bool) -> bool:
    """Whether `module` has the reference's bits, on the CPU. Its rows are of very different size, so that eps matters."""
    generator, D = torch.Generator("cpu").manual_seed(0), module.weight.numel()
    size = torch.tensor([[1e-4], [1e-3], [1.0], [50.0]], device="cpu")
    x = size * torch.randn(4, D, generator=generator, device="cpu")
    weight = 1.5 * torch.rand(D, generator=generator, device="cpu") - 0.5
    for dtype in (torch.float32, torch.bfloat16):
        probe = copy.copy(module)
        probe.__dict__["_parameters"] = {"weight": nn.Parameter(weight.to(dtype), requires_grad=False)}
        want = rms_norm_reference(x.to(dtype), weight.to(dtype), eps, zero_centred)
        got = probe(x.to(dtype))
        if not isinstance(got, torch.Tensor) or got.dtype != dtype or not torch.equal(got, want):
            return False
    return True


def norms(model: nn.Module) -> dict[str, bool]:
    """The RMSNorms inside `model` by name, in its order, with whether each is zero-centred."""
    found = {name: form_of(module) for name, module in model.named_modules() if name}
    return {name: form for name, form in found.items() if form is not None}


def fusable_layers(model: nn.Module, swapped: dict[str, bool]) -> list[str]:
    """Names of the Qwen3.5 decoder layers whose norms are of `swapped`, that add the residual just before the second and at
    the end, and do nothing else."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ == DECODER_LAYER and {f"{name}.{norm}" for norm in LAYER_NORMS} <= swapped.keys()
    }
    if not layers:
        return []
    from .layer import computes_the_same

    return [name for name, layer in layers.items() if "forward" not in layer.__dict__ and computes_the_same(layer)]


def eligible(run: Run) -> str | None:
    """None, or why this run can't have the kernel: no Triton, no RMSNorm of these forms, or a weight of another dtype."""
    found = norms(run.model)
    reason = no_kernel_for(found, "RMSNorm that multiplies by weight or 1 + weight and does nothing else", run)
    return reason or of_another_dtype({f"{name}.weight": run.model.get_submodule(name).weight for name in found}, run)


def apply(run: Run) -> None:
    """Replaces every such norm, then the decoder layers around them. Raises ValueError when there is no norm."""
    swapped = norms(run.model)
    if not swapped:
        raise ValueError(f"{type(run.model).__name__} has no RMSNorm to replace")
    layers = fusable_layers(run.model, swapped)
    for name, zero_centred in swapped.items():
        norm = run.model.get_submodule(name)
        run.model.set_submodule(name, FusedRMSNorm(norm.weight, epsilon(norm), zero_centred).train(norm.training))
    if layers:
        from .layer import FusedDecoderLayer

        for name in layers:
            run.model.set_submodule(name, FusedDecoderLayer(run.model.get_submodule(name)))
