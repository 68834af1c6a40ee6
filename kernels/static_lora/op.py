"""The two sides as functions of one input tuple, for the op check and the microbenchmark."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kernels.contract import Op, Workload

from .kernel import StaticLora


def lora_op(*workloads: Workload) -> Op:
    return Op(
        reference=lambda x, layer, _: layer(x),
        candidate=lambda x, _, static: static(x),
        inputs=_inputs,
        workloads=workloads,
        bytes_moved=_bytes_moved,
        flops=_flops,
    )


def _inputs(workload: Workload, device: torch.device, seed: int) -> tuple[Any, ...]:
    """x [T, D_in] that requires a gradient, PEFT's layer, and the static layer over the same parameters."""
    from .reference import peft_layer

    shape, dtype = workload.shape, getattr(torch, workload.dtype)
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(device, dtype)

    base = nn.Linear(shape["D_in"], shape["D_out"], bias=False, device=device, dtype=dtype)
    base.weight.data = normal(shape["D_out"], shape["D_in"], scale=shape["D_in"] ** -0.5)
    a = normal(shape["R"], shape["D_in"], scale=shape["D_in"] ** -0.5)
    layer = peft_layer(base, a, normal(shape["D_out"], shape["R"], scale=shape["R"] ** -0.5), alpha=2.0 * shape["R"])
    static = StaticLora(base, layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"], 0.0)
    return normal(shape["T"], shape["D_in"]).requires_grad_(), layer, static


def _flops(workload: Workload) -> int:
    """Base product forward and dX; adapters forward, dX and both weight gradients."""
    T, D, O, R = (workload.shape[key] for key in ("T", "D_in", "D_out", "R"))
    return 2 * T * D * O * 2 + 2 * T * R * (D + O) * 3


def _bytes_moved(workload: Workload) -> int:
    """x, y and the weights once forward; dy, x, dx, the weights and the adapter gradients once backward."""
    T, D, O, R = (workload.shape[key] for key in ("T", "D_in", "D_out", "R"))
    item = torch.empty(0, dtype=getattr(torch, workload.dtype)).element_size()
    weights = D * O + R * (D + O)
    return item * (T * D + T * O + weights + T * O + 2 * T * D + weights + R * (D + O))
