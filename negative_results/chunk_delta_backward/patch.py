"""Swaps the per-document PyTorch delta layers for FLA's with kept states and one backward kernel within chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.kept_delta_states import patch as kept_delta_states
from kernels.ssm_fast_path import patch as ssm_fast_path
from loop.delta_net import PackedDeltaNet

if TYPE_CHECKING:
    from loop.run import Run

WIDTHS = (16, 32, 64, 128)  # of heads: a program holds a whole one, and tiles are powers of 2


def eligible(run: Run) -> str | None:
    """None, or why not: what `kept_delta_states` says, or heads of another width."""
    return kept_delta_states.eligible(run) or _width(run)


def _width(run: Run) -> str | None:
    layers = [module for module in run.model.modules() if isinstance(module, PackedDeltaNet)]
    other = {size for layer in layers for size in (layer.head_k_dim, layer.head_v_dim)} - set(WIDTHS)
    return f"heads are {', '.join(map(str, sorted(other)))} wide; the kernel takes {WIDTHS}" if other else None


def apply(run: Run) -> None:
    from .kernel import ChunkedDeltaNet

    ssm_fast_path.swap(run.model, ChunkedDeltaNet)
