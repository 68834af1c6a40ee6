"""The reference: what the MLPs of transformers compute between their projections."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def silu_mul_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, both [..., I] of one floating dtype; so is y. In bf16 silu(gate) is rounded first."""
    return F.silu(gate) * up
