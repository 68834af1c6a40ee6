"""The same elementwise kernel with other numbers of warps.

Nothing here imports triton: a box without a GPU sets TRITON_INTERPRET first, and the kernel is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels import silu_mul
from kernels.contract import Exactness, Needs, Op, Optimization, Workload

from .reference import reference

if TYPE_CHECKING:
    from loop.run import Run

WORKLOADS = (
    *(Workload(f"2B MLP, {warps} warps", {"T": 5376, "I": 6144, "warps": warps}) for warps in (1, 2, 4, 8, 16, 32)),
    *(Workload(f"2B MLP, pack 1024, {warps} warps", {"T": 1024, "I": 6144, "warps": warps}) for warps in (2, 4, 8)),
    Workload("small, 1 warp", {"T": 48, "I": 512, "warps": 1}, dtype="float32", small=True),
    Workload("small, ragged, 8 warps", {"T": 37, "I": 123, "warps": 8}, dtype="float32", small=True),
)


def _candidate(gate: torch.Tensor, up: torch.Tensor, warps: int) -> torch.Tensor:
    from .kernel import silu_mul_with_warps

    return silu_mul_with_warps(gate, up, warps)


def _inputs(workload: Workload, device: torch.device, seed: int) -> tuple[torch.Tensor | int, ...]:
    """silu_mul's gate and up, both [T, I], and the number of warps."""
    return *silu_mul.OPTIMIZATION.op.inputs(workload, device, seed), workload.shape["warps"]


def _eligible(run: Run) -> str | None:
    from .patch import eligible

    return eligible(run)


def _apply(run: Run) -> None:
    from .patch import apply

    apply(run)


OPTIMIZATION = Optimization(
    name="elementwise_warps",
    summary="silu_mul's kernels launched with 8 warps a program instead of 4; its op with every number from 1 to 32",
    exactness=Exactness.ROUNDING,
    why_exact="the same bits as silu_mul whatever the number of warps, since no value meets another; beside PyTorch, "
    "rounded once where silu_mul rounds once",
    eligible=_eligible,
    apply=_apply,
    op=Op(
        reference,
        _candidate,
        _inputs,
        WORKLOADS,
        silu_mul.OPTIMIZATION.op.bytes_moved,
        silu_mul.OPTIMIZATION.op.flops,
    ),
    needs=Needs(cuda=True, triton=True),  # Triton's interpreter has no warps
    conflicts=("compiled_max_autotune", "fused_swiglu_matmul", "silu_mul"),
    source=("Triton's launch option num_warps: https://triton-lang.org/main/python-api/generated/triton.Config.html",),
)
