"""Swaps the per-document PyTorch delta layers for FLA's with kept states."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from kernels.ssm_fast_path import patch as ssm_fast_path

if TYPE_CHECKING:
    from loop.run import Run

PARTS = "fla.ops.gated_delta_rule.chunk_fwd"  # came with FLA 0.6, whose forward is called piece by piece here


def eligible(run: Run) -> str | None:
    """None, or why not: no gated-delta layers on the loop's PyTorch path, or an FLA that is cut into other pieces."""
    return ssm_fast_path.eligible(run) or _lacking()


def _lacking() -> str | None:
    try:
        found = importlib.util.find_spec(PARTS)
    except ModuleNotFoundError:  # of a package around it
        found = None
    return None if found else f"needs flash-linear-attention 0.6: there is no {PARTS}"


def apply(run: Run) -> None:
    from .kernel import KeptDeltaNet

    ssm_fast_path.swap(run.model, KeptDeltaNet)
