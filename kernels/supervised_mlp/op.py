"""The MLP of some positions as a function of one input tuple, for the op check and the microbenchmark."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from kernels.contract import Workload


class GatedMLP(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)), in plain PyTorch: gate and up [F, D], down [D, F]."""

    def __init__(self, D: int, F: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(D, F, bias=False, device="meta") for _ in range(2))
        self.down_proj = nn.Linear(F, D, bias=False, device="meta")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def inputs(workload: Workload, device: torch.device, seed: int) -> tuple[GatedMLP, torch.Tensor, torch.Tensor]:
    """The MLP, x [B, L, D] that requires a gradient, and S of its B * L flat positions, ascending."""
    B, L, D, wide, S = (workload.shape[key] for key in ("B", "L", "D", "F", "S"))
    dtype, generator = getattr(torch, workload.dtype), torch.Generator(device).manual_seed(seed)
    mlp = GatedMLP(D, wide)
    for linear in mlp.children():
        fan_out, fan_in = linear.weight.shape
        weight = torch.randn(fan_out, fan_in, generator=generator, device=device) * fan_in**-0.5
        linear.weight = nn.Parameter(weight.to(dtype), requires_grad=bool(workload.shape["trained"]))
    x = torch.randn(B, L, D, generator=generator, device=device).to(dtype).requires_grad_()
    rows = torch.randperm(B * L, generator=torch.Generator().manual_seed(seed))[:S].sort().values
    return mlp, x, rows.to(device)


def flops(workload: Workload) -> int:
    """Three products of S rows: forward, d input and, where the weights train, d weight."""
    D, wide, S, trained = (workload.shape[key] for key in ("D", "F", "S", "trained"))
    return 3 * 2 * S * D * wide * (2 + trained)


def bytes_moved(workload: Workload) -> int:
    """Weights once each way, and their gradients where they train; rows in and out each way; d input whole.

    What is inside the MLP counts as nothing.
    """
    B, L, D, wide, S, trained = (workload.shape[key] for key in ("B", "L", "D", "F", "S", "trained"))
    return getattr(torch, workload.dtype).itemsize * ((2 + trained) * 3 * D * wide + 3 * S * D + B * L * D)
