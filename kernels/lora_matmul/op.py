"""The two sides as functions of one input tuple, for the op check and the microbenchmark."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernels.contract import Op, Workload

from .kernel import FusedLora, SharedInput, SharingLinear


def lora_op(*workloads: Workload) -> Op:
    """T rows of D_in features into projections of O1, O2, ... features that share them, adapters of rank R; and of P1, P2,
    ... features that have none."""
    return Op(_reference, _candidate, _inputs, workloads, _bytes_moved, _flops)


def fused(layers: nn.ModuleList) -> nn.ModuleList:
    """The layers of `reference.peft_layers`, and Linears, as members of one SharedInput, over the same parameters."""
    members = nn.ModuleList()
    for layer in layers:
        if type(layer) is nn.Linear:
            members.append(SharingLinear(layer))
            continue
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        p = getattr(layer.lora_dropout["default"], "p", 0.0)
        members.append(FusedLora(layer.base_layer, a, b, layer.scaling["default"], p))
    SharedInput(members)
    return members


def _reference(x: Tensor, layers: nn.ModuleList, _: nn.ModuleList) -> tuple[Tensor, ...]:
    return tuple(layer(x) for layer in layers)


def _candidate(x: Tensor, _: nn.ModuleList, members: nn.ModuleList) -> tuple[Tensor, ...]:
    return tuple(member(x) for member in members)


def _inputs(workload: Workload, device: torch.device, seed: int) -> tuple[Any, ...]:
    """x [T, D_in] that requires a gradient, PEFT's layers, and the fused ones over the same parameters."""
    from .reference import peft_layers

    T, D, R, outs, plain = _sizes(workload)
    dtype, generator = getattr(torch, workload.dtype), torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(device, dtype)

    bases = [nn.Linear(D, out, bias=False, device=device, dtype=dtype) for out in (*outs, *plain)]
    for base in bases:
        base.weight.data = normal(*base.weight.shape, scale=D**-0.5)
    a, b = [normal(R, D, scale=D**-0.5) for _ in outs], [normal(out, R, scale=R**-0.5) for out in outs]
    layers = peft_layers(bases[: len(outs)], a, b, alpha=2.0 * R)
    layers.extend(base.requires_grad_(False) for base in bases[len(outs) :])
    return normal(T, D).requires_grad_(), layers, fused(layers)


def _sizes(workload: Workload) -> tuple[int, int, int, list[int], list[int]]:
    shape = workload.shape
    outs, plain = ([size for name, size in shape.items() if name.startswith(letter)] for letter in "OP")
    return shape["T"], shape["D_in"], shape["R"], outs, plain


def _flops(workload: Workload) -> int:
    """Base products forward and dx; adapters forward, dx and both weight gradients."""
    T, D, R, outs, plain = _sizes(workload)
    return sum(4 * T * D * out for out in (*outs, *plain)) + sum(6 * T * R * (D + out) for out in outs)


def _bytes_moved(workload: Workload) -> int:
    """x, y and the weights once forward; dy, x, dx, the weights and the adapters' gradients once backward."""
    T, D, R, outs, plain = _sizes(workload)
    columns, adapters = sum(outs) + sum(plain), sum(R * (D + out) for out in outs)
    weights = D * columns + adapters
    return getattr(torch, workload.dtype).itemsize * (3 * T * D + 2 * T * columns + 2 * weights + adapters)
