"""The reference: RMSNorm per head and rotary embedding, as transformers' Qwen3.5 and Qwen3 attention compute them."""

from __future__ import annotations

import torch

EPS = 1e-6


def rope_qk_norm_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    zero_centred: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [B, L, H, D], key [B, L, KV, D], weights [D], cos and sin [B, L, R], of one dtype -> both normed and rotated."""
    pairs = ((query, q_weight), (key, k_weight))
    query, key = (rotated(normed(x, weight, eps, zero_centred), cos, sin) for x, weight in pairs)
    return query, key


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float, zero_centred: bool) -> torch.Tensor:
    """x [..., D], weight [D] -> [..., D] in x's dtype. zero_centred (Qwen3.5): times 1 + weight in fp32, then rounded;
    otherwise (Qwen3): rounded, then times weight, which rounds again."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * (1.0 + weight.float())).to(x.dtype) if zero_centred else weight * wide.to(x.dtype)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [B, L, heads, D], cos and sin [B, L, R]: the first R columns rotated, each with the one half of R away; the rest as
    it is. Products and their sum are rounded to x's dtype."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    low, high = turned.chunk(2, dim=-1)
    turned = turned * cos.unsqueeze(2) + torch.cat((-high, low), dim=-1) * sin.unsqueeze(2)
    return torch.cat((turned, rest), dim=-1)
