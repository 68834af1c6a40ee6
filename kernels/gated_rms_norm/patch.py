"""Swaps the gated RMSNorm of every delta-rule layer for the kernel."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING

import torch
from torch import nn

from kernels.norms import epsilon, is_one_weight, no_kernel_for, of_another_dtype

from .reference import gated_rms_norm_reference

if TYPE_CHECKING:
    from loop.run import Run

WIDEST = 1 << 16  # the kernel's limit


class FusedGatedRMSNorm(nn.Module):
    """x, gate [..., D] -> [..., D]: x over its root mean square, times weight, times silu(gate), with the parameter of the
    norm that it replaces."""

    def __init__(self, weight: nn.Parameter, eps: float):
        super().__init__()
        self.weight = weight
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        from .kernel import gated_rms_norm

        return gated_rms_norm(hidden_states, gate, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.variance_epsilon}"


def is_gated_norm(module: nn.Module) -> bool:
    """Whether `module` computes exactly norm(x) * weight * silu(gate).

    The structure must be right (one weight and an epsilon, two inputs, nothing of its own, no hooks that a swap would lose),
    and so must the behaviour: the forward is run on known values, whose bits in fp32 and bf16 tell where it rounds, whether
    the gate comes behind the norm, and which activation it goes through.
    """
    if isinstance(module, FusedGatedRMSNorm) or not is_one_weight(module):
        return False
    weight, eps = module.weight, epsilon(module)
    if weight is None or weight.ndim != 1 or not 1 <= weight.numel() <= WIDEST or eps is None:
        return False
    names = list(inspect.signature(type(module).forward).parameters)
    return len(names) == 3 and names[2] == "gate" and _behaves(module, eps)


def _behaves(module: nn.Module, eps: float) -> bool:
    """Whether `module` has the reference's bits, on the CPU. Its rows are of very different size, so that eps matters."""
    generator, D = torch.Generator("cpu").manual_seed(0), module.weight.numel()
    size = torch.tensor([[1e-4], [1e-3], [1.0], [50.0]], device="cpu")
    x, gate = (torch.randn(4, D, generator=generator, device="cpu") * scale for scale in (size, 4.0))
    weight = 1.5 * torch.rand(D, generator=generator, device="cpu") - 0.5
    for dtype in (torch.float32, torch.bfloat16):
        probe = copy.copy(module)
        probe.__dict__["_parameters"] = {"weight": nn.Parameter(weight.to(dtype), requires_grad=False)}
        want = gated_rms_norm_reference(x.to(dtype), gate.to(dtype), weight.to(dtype), eps)
        got = probe(x.to(dtype), gate.to(dtype))
        if not isinstance(got, torch.Tensor) or got.dtype != dtype or not torch.equal(got, want):
            return False
    return True


def gated_norms(model: nn.Module) -> list[str]:
    """Names of the modules inside `model` that `apply` swaps, in the model's order."""
    return [name for name, module in model.named_modules() if name and is_gated_norm(module)]


def eligible(run: Run) -> str | None:
    """None, or why this run can't have the kernel: no Triton, no gated norm of this form, or a weight of another dtype."""
    names = gated_norms(run.model)
    reason = no_kernel_for(names, "gated RMSNorm of the form norm(x) * weight * silu(gate)", run)
    return reason or of_another_dtype({f"{name}.weight": run.model.get_submodule(name).weight for name in names}, run)


def apply(run: Run) -> None:
    """Replaces every such norm of `run.model`. Raises ValueError when there is none."""
    names = gated_norms(run.model)
    if not names:
        raise ValueError(f"{type(run.model).__name__} has no gated RMSNorm to replace")
    for name in names:
        norm = run.model.get_submodule(name)
        run.model.set_submodule(name, FusedGatedRMSNorm(norm.weight, epsilon(norm)).train(norm.training))
