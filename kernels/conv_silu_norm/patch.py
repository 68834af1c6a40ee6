"""Puts one module in the place of every gated-delta layer's convolution, which then also splits and normalises."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from kernels.norms import no_kernel_for, of_another_dtype
from kernels.swapping import is_watched
from loop.delta_net import Pack, PackedDeltaNet, QkvMixer

from .reference import EPS

if TYPE_CHECKING:
    from loop.run import Run

TAPS, WIDEST = 4, 1024  # the kernel's limits
ACTIVATIONS = ("silu", "swish")  # two names of one function


class ConvSiluNorm(QkvMixer):
    """Convolution, SiLU, split and L2 norm of q and k, with the weight of the convolution that it replaces, [C, 1, 4]."""

    def __init__(self, weight: nn.Parameter, key_heads: int, key_width: int, value_width: int):
        super().__init__()
        self.weight = weight
        self.key_heads, self.key_width, self.value_width = key_heads, key_width, value_width

    def forward(self, x: torch.Tensor, pack: Pack) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [1, T, C] -> q, k [1, T, key heads, K] of length 1, v [1, T, value heads, V]; documents of `pack` apart."""
        from .kernel import conv_silu_norm

        weight = self.weight.squeeze(1)
        q, k, v = conv_silu_norm(x.squeeze(0), weight, pack.starts, self.key_heads, self.key_width, EPS)
        return q[None], k[None], v.unflatten(1, (-1, self.value_width))[None]

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} columns, {self.key_heads} key heads of {self.key_width}"


def mixing_layers(model: nn.Module) -> list[str]:
    """Names of the gated-delta layers inside `model`, whatever computes their delta rule, whose convolution is still one."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, PackedDeltaNet) and not isinstance(module.conv1d, QkvMixer)
    ]


def beyond_the_kernel(layer: PackedDeltaNet) -> str | None:
    """What the layer's convolution or heads are that the kernel can't compute, or None."""
    conv, columns = layer.conv1d, 2 * layer.key_dim + layer.value_dim
    if type(conv) is not nn.Conv1d or is_watched(conv):
        return f"is a {type(conv).__name__} that is more than PyTorch's Conv1d, or carries hooks"
    if conv.weight.shape != (columns, 1, TAPS) or conv.dilation != (1,) or conv.stride != (1,):
        return f"has a weight of shape {list(conv.weight.shape)}; [{columns}, 1, {TAPS}] with step 1 is expected"
    if conv.bias is not None:
        return "has a bias"
    if layer.activation not in ACTIVATIONS:
        return f"is followed by {layer.activation}, not SiLU"
    if layer.head_k_dim > WIDEST:
        return f"is followed by key heads of {layer.head_k_dim}; the kernel takes up to {WIDEST}"
    return None


def eligible(run: Run) -> str | None:
    """None, or why this run can't have the kernel: no Triton, no delta layer, another convolution, or another dtype."""
    names = mixing_layers(run.model)
    reason = no_kernel_for(names, "gated-delta layers with a convolution", run)
    if reason:
        return reason
    for name in names:
        layer = run.model.get_submodule(name)
        reason = beyond_the_kernel(layer)
        if reason:
            return f"{name}.conv1d {reason}"
        reason = of_another_dtype({f"{name}.conv1d.weight": layer.conv1d.weight}, run)
        if reason:
            return reason
    return None


def apply(run: Run) -> None:
    """Replaces every such layer's `conv1d`. Raises ValueError when there is none."""
    names = mixing_layers(run.model)
    if not names:
        raise ValueError(f"{type(run.model).__name__} has no gated-delta layer to change")
    for name in names:
        layer = run.model.get_submodule(name)
        mixer = ConvSiluNorm(layer.conv1d.weight, layer.num_k_heads, layer.head_k_dim, layer.head_v_dim)
        layer.conv1d = mixer.train(layer.conv1d.training)
