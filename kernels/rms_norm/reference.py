"""The reference: RMSNorm in the two forms that transformers' models have, alone and behind a residual addition."""

from __future__ import annotations

import torch

EPS = 1e-6


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float, zero_centred: bool) -> torch.Tensor:
    """x [..., D], weight [D] of one floating dtype -> [..., D] in it.

    zero_centred (Qwen3.5, Gemma): times 1 + weight in fp32, then rounded to x's dtype. Otherwise (Llama, Mistral, Qwen2,
    Qwen3): rounded to x's dtype, then times weight, which rounds again.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if zero_centred:
        return (normed * (1.0 + weight.float())).to(x.dtype)
    return weight * normed.to(x.dtype)


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, zero_centred: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, residual [..., D], weight [D] -> the norm of their sum, and the sum, rounded to x's dtype before it is normed."""
    total = residual + x
    return rms_norm_reference(total, weight, eps, zero_centred), total


def norm_reference(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, zero_centred: bool
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Both of the above as one function of an op's inputs."""
    if residual is None:
        return rms_norm_reference(x, weight, EPS, zero_centred)
    return add_rms_norm_reference(x, residual, weight, EPS, zero_centred)
