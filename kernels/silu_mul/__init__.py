"""SiLU(gate) * up as one kernel: the elementwise part of a gated MLP. See the README for why it is exact.

Nothing here imports triton: a box without a GPU sets TRITON_INTERPRET first, and the kernel is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels.contract import Exactness, Needs, Op, Optimization, Workload

from .reference import silu_mul_reference

if TYPE_CHECKING:
    from loop.run import Run

WORKLOADS = (
    Workload("2B MLP, pack 5376", {"T": 5376, "I": 6144}),
    Workload("0.8B MLP, pack 5376", {"T": 5376, "I": 3584}),
    Workload("2B MLP, pack 1024", {"T": 1024, "I": 6144}),
    Workload("small", {"T": 48, "I": 512}, dtype="float32", small=True),
    Workload("small, ragged", {"T": 37, "I": 123}, dtype="float32", small=True),
    Workload("beyond 2^31 elements", {"T": 350_003, "I": 6144}, beyond_int32=True),
)


def _candidate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    from .kernel import silu_mul

    return silu_mul(gate, up)


def _inputs(workload: Workload, device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    """gate and up, both [T, I]. The gate is spread wide enough to reach both flat ends of the sigmoid."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (workload.shape["T"], workload.shape["I"])
    dtype = getattr(torch, workload.dtype)

    def draw(scale: float) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype).requires_grad_()

    return draw(3.0), draw(1.0)


def _bytes_moved(workload: Workload) -> int:
    """Forward reads gate and up and writes y; backward reads dy, gate and up and writes dgate and dup."""
    return 8 * workload.shape["T"] * workload.shape["I"] * getattr(torch, workload.dtype).itemsize


def _flops(workload: Workload) -> int:
    """Forward: 5 an element (negate, exp, add, divide, multiply). Backward: 12, the sigmoid again and both products."""
    return 17 * workload.shape["T"] * workload.shape["I"]


def _eligible(run: Run) -> str | None:
    from .patch import eligible

    return eligible(run)


def _apply(run: Run) -> None:
    from .patch import apply

    apply(run)


OPTIMIZATION = Optimization(
    name="silu_mul",
    summary="SiLU(gate) * up of every gated MLP in one Triton kernel, with its own backward",
    exactness=Exactness.ROUNDING,
    why_exact=(
        "the same formula, evaluated in fp32 and rounded once: PyTorch rounds silu(gate) to the compute dtype before the "
        "product, and dy * up before it goes through the derivative of silu; the kernel does neither"
    ),
    eligible=_eligible,
    apply=_apply,
    op=Op(silu_mul_reference, _candidate, _inputs, WORKLOADS, _bytes_moved, _flops),
    needs=Needs(triton=True),
    source=(
        "Shazeer 2020, GLU Variants Improve Transformer, https://arxiv.org/abs/2002.05202",
        "Elfwing et al. 2017, Sigmoid-Weighted Linear Units, https://arxiv.org/abs/1702.03118",
    ),
)
