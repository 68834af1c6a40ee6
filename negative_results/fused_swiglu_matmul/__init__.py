"""The gate and up products of an MLP and the SwiGLU between them as one kernel.

Nothing here imports triton: a box without a GPU sets TRITON_INTERPRET first, and the kernel is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.contract import Exactness, Needs, Op, Optimization, Workload

from . import reference

if TYPE_CHECKING:
    from torch import Tensor

    from loop.run import Run

WORKLOADS = (
    Workload("2B MLP, pack 5376", {"T": 5376, "D": 2048, "I": 6144}),
    Workload("0.8B MLP, pack 5376", {"T": 5376, "D": 1024, "I": 3584}),
    Workload("2B MLP, pack 512", {"T": 512, "D": 2048, "I": 6144}),
    Workload("small", {"T": 48, "D": 64, "I": 160}, dtype="float32", small=True),
    Workload("small, ragged", {"T": 37, "D": 51, "I": 143}, dtype="float32", small=True),
)


def _candidate(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    from .kernel import fused_swiglu

    return fused_swiglu(x, gate_weight, up_weight)


def _eligible(run: Run) -> str | None:
    from .patch import eligible

    return eligible(run)


def _apply(run: Run) -> None:
    from .patch import apply

    apply(run)


OPTIMIZATION = Optimization(
    name="fused_swiglu_matmul",
    summary="gate and up products and silu(gate) * up of plain gated MLPs in one Triton kernel, two accumulators a tile",
    exactness=Exactness.ROUNDING,
    why_exact="the same products, summed in fp32 in the kernel's order; y comes from the unrounded sums, rounded once, "
    "and the second part of dx is added inside its product",
    eligible=_eligible,
    apply=_apply,
    op=Op(reference.swiglu, _candidate, reference.inputs, WORKLOADS, reference.bytes_moved, reference.flops),
    needs=Needs(triton=True),
    conflicts=(
        "compiled_max_autotune",
        "contiguous_linear_patch",
        "elementwise_warps",
        "full_ft_linear",
        "silu_mul",
        "triton_fp8_dot",
    ),
    source=("GLU Variants Improve Transformer: arXiv 2002.05202",),
)
