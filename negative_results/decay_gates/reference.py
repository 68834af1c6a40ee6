"""The reference: the loop's own decay and beta, which are transformers'."""

from __future__ import annotations

import torch

from loop.delta_net import DecayGates


def decay_gates_reference(
    a: torch.Tensor, b: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """a, b [..., H], A_log, dt_bias [H] -> beta = sigmoid(b) in b's dtype, g = -exp(A_log) softplus(a + dt_bias) in fp32."""
    return DecayGates().forward(a, b, A_log, dt_bias)
