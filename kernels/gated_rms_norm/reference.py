"""The reference: the gated RMSNorm behind the delta rule, as transformers' Qwen3_5RMSNormGated computes it."""

from __future__ import annotations

import torch
from torch.nn import functional as F

EPS = 1e-6


def gated_rms_norm_reference(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    """x, gate [..., D], weight [D] of one floating dtype -> [..., D] in it: x over its root mean square, times weight, times
    silu(gate). The norm is rounded before the weight, the product with the weight too, and silu is fp32."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * wide.to(x.dtype) * F.silu(gate.float())).to(x.dtype)
