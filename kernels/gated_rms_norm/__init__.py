"""The gated RMSNorm behind the delta rule in one launch each way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.contract import Exactness, Needs, Optimization, Workload

from .op import gated_norm_op

if TYPE_CHECKING:
    from loop.run import Run

WORKLOADS = (
    Workload("2B, 16 heads, frozen", {"T": 5376 * 16, "D": 128, "trained": 0}),
    Workload("2B, 16 heads, trained", {"T": 5376 * 16, "D": 128, "trained": 1}),
    Workload("2B, pack 1024, frozen", {"T": 1024 * 16, "D": 128, "trained": 0}),
    Workload("small", {"T": 96, "D": 32, "trained": 1}, "float32", small=True),
    Workload("small, ragged", {"T": 37, "D": 123, "trained": 1}, "float32", small=True),
    Workload("small, ragged, frozen", {"T": 41, "D": 75, "trained": 0}, "float32", small=True),
    Workload("small, many rows", {"T": 1531, "D": 24, "trained": 1}, "float32", small=True),
)


def _eligible(run: Run) -> str | None:
    from .patch import eligible

    return eligible(run)


def _apply(run: Run) -> None:
    from .patch import apply

    apply(run)


OPTIMIZATION = Optimization(
    name="gated_rms_norm",
    summary="RMSNorm, weight and SiLU gate behind the delta rule in one Triton kernel each way",
    exactness=Exactness.ROUNDING,
    why_exact=(
        "the same formula; forward it rounds where PyTorch rounds, and only squares are added up in another order; backward "
        "each gradient is rounded once, where PyTorch also rounds those of the products on the way, and the gradient of the "
        "weight is a sum of fp32 products in another order"
    ),
    eligible=_eligible,
    apply=_apply,
    op=gated_norm_op(*WORKLOADS),
    needs=Needs(triton=True),
    source=(
        "Yang, Kautz and Hatamizadeh 2024, Gated Delta Networks, https://arxiv.org/abs/2412.06464",
        "Zhang and Sennrich 2019, Root Mean Square Layer Normalization, https://arxiv.org/abs/1910.07467",
    ),
)
