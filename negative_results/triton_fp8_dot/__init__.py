"""Projections whose forward product is tl.dot on e4m3 operands.

Nothing here imports triton: a box without a GPU sets TRITON_INTERPRET first, and the kernel is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.contract import Exactness, Fails, Needs, Op, Optimization, Workload

from . import patch, reference

if TYPE_CHECKING:
    from torch import Tensor

WORKLOADS = (
    Workload("gate_proj 2B", {"T": 5376, "D_in": 2048, "D_out": 6144, "trained": 0}),
    Workload("down_proj 2B", {"T": 5376, "D_in": 6144, "D_out": 2048, "trained": 0}),
    Workload("gate_proj 2B, trained", {"T": 5376, "D_in": 2048, "D_out": 6144, "trained": 1}),
    Workload("small", {"T": 48, "D_in": 64, "D_out": 160, "trained": 1}, dtype="float32", small=True),
    Workload("small, ragged", {"T": 37, "D_in": 51, "D_out": 143, "trained": 0}, dtype="float32", small=True),
)


def _candidate(x: Tensor, weight: Tensor) -> Tensor:
    from .kernel import fp8_linear

    return fp8_linear(x, weight)


OPTIMIZATION = Optimization(
    name="triton_fp8_dot",
    summary="forward products of the decoder's projections in Triton on e4m3 operands, a scale a row; backward untouched",
    exactness=Exactness.APPROX,
    why_exact="it is not: both operands are rounded to three bits of mantissa, whatever the compute dtype",
    eligible=patch.eligible,
    apply=patch.apply,
    op=Op(reference.linear, _candidate, reference.inputs, WORKLOADS, reference.bytes_moved, reference.flops),
    needs=Needs(cuda=True, triton=True, capability=((8, 9), (12, 1))),  # interpreted, e4m3 is right and takes minutes a run
    conflicts=(
        "compiled_max_autotune",
        "contiguous_linear_patch",
        "full_ft_linear",
        "fused_swiglu_matmul",
        "lora_matmul",
        "merged_lora",
        "static_lora",
    ),
    source=("FP8 Formats for Deep Learning: arXiv 2209.05433",),
    fails=Fails(arm=("float32",)),  # where the gate also takes slopes, which a forward of steps does not have
)
