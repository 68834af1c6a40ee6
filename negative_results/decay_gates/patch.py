"""Puts the kernel in the place of every gated-delta layer's `gates`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from kernels.norms import DTYPES, no_kernel_for
from kernels.swapping import is_watched
from loop.delta_net import DecayGates, PackedDeltaNet

if TYPE_CHECKING:
    from loop.run import Run


class FusedDecayGates(nn.Module):
    """As `loop.delta_net.DecayGates`."""

    def forward(
        self, a: torch.Tensor, b: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from .kernel import decay_gates

        return decay_gates(a, b, A_log, dt_bias)


def gated_layers(model: nn.Module) -> list[str]:
    """Names of the gated-delta layers inside `model` whose gates are the loop's own."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, PackedDeltaNet) and type(module.gates) is DecayGates
    ]


def eligible(run: Run) -> str | None:
    """None, or why this run can't have the kernel: no Triton, no delta layer, hooks on one's gates, or another dtype."""
    names = gated_layers(run.model)
    reason = no_kernel_for(names, "gated-delta layers with gates of the loop's own", run)
    if reason:
        return reason
    for name in names:
        layer = run.model.get_submodule(name)
        if is_watched(layer.gates):
            return f"{name}.gates carries hooks or a forward of its own, which a swap would lose"
        for parameter in ("A_log", "dt_bias"):
            if getattr(layer, parameter).dtype not in DTYPES:
                return f"{name}.{parameter} is {getattr(layer, parameter).dtype}; the kernel takes {DTYPES}"
    return None


def apply(run: Run) -> None:
    """Swaps the gates of every such layer. Raises ValueError when there is none."""
    names = gated_layers(run.model)
    if not names:
        raise ValueError(f"{type(run.model).__name__} has no gated-delta layer whose gates could be replaced")
    for name in names:
        run.model.get_submodule(name).gates = FusedDecayGates()
