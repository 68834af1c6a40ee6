"""Swaps the per-document PyTorch delta layers for FLA's, and refuses the Triton versions with which FLA is wrong."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import nn

from loop.delta_net import PackedDeltaNet

if TYPE_CHECKING:
    from loop.run import Run

# On Hopper, Triton 3.4.0 up to but not including 3.7.1 miscompiles FLA's gated backward (flash-linear-attention issue 640).
WRONG_ON_HOPPER = ((3, 4, 0), (3, 7, 1))


def eligible(run: Run) -> str | None:
    """None, or why not: no gated-delta layers that still run on the loop's PyTorch path."""
    if not any(type(module) is PackedDeltaNet for module in run.model.modules()):
        return "the model has no gated-delta layers on the PyTorch path"
    return None


def known_wrong(device: torch.device) -> str | None:
    """Why the Triton installed here must not compile FLA's backward for this CUDA device, or None."""
    import triton

    version = re.match(r"(\d+)\.(\d+)\.(\d+)", triton.__version__)
    return triton_refusal(torch.cuda.get_device_capability(device), tuple(map(int, version.groups())))


def triton_refusal(capability: tuple[int, int], version: tuple[int, ...]) -> str | None:
    """Why FLA's gated backward must not run on this device with this Triton, or None."""
    low, high = WRONG_ON_HOPPER
    if capability[0] == 9 and low <= version < high:
        return (
            f"FLA's gated backward is wrong on Hopper with Triton {'.'.join(map(str, version))} (FLA issue 640); use 3.7.1"
        )
    return None


def apply(run: Run) -> None:
    from .kernel import FlaDeltaNet

    swap(run.model, FlaDeltaNet)


def swap(model: nn.Module, layer: type[PackedDeltaNet]) -> None:
    """Every gated-delta layer that is still on the loop's PyTorch path becomes a `layer`, around the same parameters."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is PackedDeltaNet:
                setattr(parent, name, layer(child))
