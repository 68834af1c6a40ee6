"""Swaps the attention layers whose query and key heads are normed and rotated for ones that do it in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from kernels.norms import DTYPES, epsilon, is_one_weight, no_kernel_for

from .layer import Form, FusedQkAttention, computes_the_same
from .reference import normed

if TYPE_CHECKING:
    from loop.run import Run

WIDEST = 1 << 12  # the kernel's limit
MODELS = "transformers.models"
FORMS = {
    "Qwen3_5Attention": Form(f"{MODELS}.qwen3_5.modeling_qwen3_5", zero_centred=True, gated=True, part=4),
    "Qwen3Attention": Form(f"{MODELS}.qwen3.modeling_qwen3", zero_centred=False, gated=False, part=1),
}
PARTS = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}


def attentions(model: nn.Module) -> dict[str, Form]:
    """The attention layers inside `model` by name, in its order, with their forms."""
    names = {name: type(module).__name__ for name, module in model.named_modules()}
    return {name: FORMS[kind] for name, kind in names.items() if kind in FORMS}


def obstacle(layer: nn.Module, form: Form) -> str | None:
    """Why `layer` can't be replaced, or None."""
    if set(layer._modules) != PARTS or "forward" in layer.__dict__:
        return "is not put together as transformers' attention of that name"
    if layer.head_dim > WIDEST:
        return f"has heads of {layer.head_dim}; the kernel takes up to {WIDEST}"
    for name in ("q_norm", "k_norm"):
        if not _is_norm(layer.get_submodule(name), layer.head_dim, form):
            return f"has a {name} that is no plain RMSNorm over {layer.head_dim}, or carries hooks"
    if epsilon(layer.q_norm) != epsilon(layer.k_norm):
        return f"has norms with {epsilon(layer.q_norm)} and {epsilon(layer.k_norm)}; the kernel takes one epsilon"
    if not computes_the_same(layer, form):
        return "computes something else than transformers' attention of that name, or in another order"
    return None


def _is_norm(norm: nn.Module, D: int, form: Form) -> bool:
    """Whether `norm` is an RMSNorm of this form by structure and, on known values, by what it computes.

    A rounding apart: rms_norm's kernel may be in its place already, whose sums are in another order, and which runs only on
    the run's own device.
    """
    if not is_one_weight(norm):
        return False
    weight, eps = norm.weight, epsilon(norm)
    if weight is None or weight.shape != (D,) or eps is None or weight.dtype not in DTYPES:
        return False
    x = torch.randn(4, D, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(weight)
    with torch.no_grad():
        got, want = norm(x), normed(x, weight, eps, form.zero_centred)
    largest = float(want.abs().max())
    return got.shape == want.shape and float((got - want).abs().max()) <= 4 * torch.finfo(want.dtype).eps * largest


def eligible(run: Run) -> str | None:
    """None, or why this run can't have the kernel: no Triton, no attention of these kinds, other norms, or another dtype."""
    found = attentions(run.model)
    reason = no_kernel_for(found, f"attention of the kinds {', '.join(FORMS)}", run)
    if reason:
        return reason
    for name, form in found.items():
        layer = run.model.get_submodule(name)
        reason = obstacle(layer, form)
        if reason:
            return f"{name} {reason}"
        dtypes = {layer.q_norm.weight.dtype, layer.k_norm.weight.dtype}
        if dtypes != {run.dtype}:
            words = " and ".join(sorted(map(str, dtypes)))
            return f"{name} has norm weights in {words}, but the run computes in {run.dtype}; the kernel takes one dtype"
    return None


def apply(run: Run) -> None:
    """Replaces every such attention layer of `run.model`. Raises ValueError when there is none."""
    found = attentions(run.model)
    if not found:
        raise ValueError(f"{type(run.model).__name__} has no attention to replace")
    for name, form in found.items():
        run.model.set_submodule(name, FusedQkAttention(run.model.get_submodule(name), form))
