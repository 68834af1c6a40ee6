"""The two sides as functions of one input tuple, for the op check and the microbenchmark.

An op may not write to its inputs, so the candidate merges into a copy of the weight, step by step; training has no copy.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from kernels.contract import Op, Workload
from kernels.static_lora.op import lora_op

from .kernel import merge_, merged_linear


def merged_op(*workloads: Workload) -> Op:
    """T rows of D_in features into D_out, rank R. B comes from zero to its values in `steps` equal steps of an optimizer."""
    return replace(
        lora_op(*workloads), reference=lambda x, layer, steps: layer(x), candidate=_candidate, inputs=_inputs(lora_op())
    )


def _inputs(op: Op):
    def inputs(workload: Workload, device: torch.device, seed: int) -> tuple[Any, ...]:
        """x [T, D_in] that requires a gradient, PEFT's layer, and in how many steps its B came about."""
        x, layer, _ = op.inputs(workload, device, seed)
        return x, layer, workload.shape["steps"]

    return inputs


def _candidate(x: Tensor, layer: nn.Module, steps: int) -> Tensor:
    base, a, b = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    scaling, merged = layer.scaling["default"], base.weight.detach().clone()
    with torch.no_grad():
        for before, after in pairwise(range(steps + 1)):
            merge_(merged, a, b * (after / steps), a, b * (before / steps), scaling)
    return merged_linear(x, merged, base.bias, a, b, scaling)
