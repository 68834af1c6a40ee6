"""RMSNorm in one launch each way, with the residual additions that a decoder layer has beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.contract import Exactness, Needs, Optimization, Workload

from .op import norm_op

if TYPE_CHECKING:
    from loop.run import Run

QWEN35, PLAIN = {"zero_centred": 1}, {"zero_centred": 0}
ALONE, BEHIND_ADDITION = {"add": 0}, {"add": 1}
TRAINED, FROZEN = {"trained": 1}, {"trained": 0}

WORKLOADS = (
    Workload("2B post-attention, frozen", {"T": 5376, "D": 2048} | QWEN35 | BEHIND_ADDITION | FROZEN),
    Workload("2B post-attention, trained", {"T": 5376, "D": 2048} | QWEN35 | BEHIND_ADDITION | TRAINED),
    Workload("2B input norm, frozen", {"T": 5376, "D": 2048} | QWEN35 | ALONE | FROZEN),
    Workload("2B input norm, trained", {"T": 5376, "D": 2048} | QWEN35 | ALONE | TRAINED),
    Workload("2B query heads, trained", {"T": 5376 * 8, "D": 256} | QWEN35 | ALONE | TRAINED),
    Workload("plain 4096, trained", {"T": 4096, "D": 4096} | PLAIN | ALONE | TRAINED),
    Workload("small", {"T": 48, "D": 128} | QWEN35 | ALONE | TRAINED, "float32", small=True),
    Workload("small, ragged, added", {"T": 37, "D": 123} | QWEN35 | BEHIND_ADDITION | TRAINED, "float32", small=True),
    Workload("small, ragged, added, frozen", {"T": 41, "D": 75} | QWEN35 | BEHIND_ADDITION | FROZEN, "float32", small=True),
    Workload("small, many short rows", {"T": 1531, "D": 24} | QWEN35 | ALONE | TRAINED, "float32", small=True),
    Workload("small, plain", {"T": 29, "D": 321} | PLAIN | ALONE | TRAINED, "float32", small=True),
    Workload("small, plain, frozen", {"T": 33, "D": 96} | PLAIN | ALONE | FROZEN, "float32", small=True),
)


def _eligible(run: Run) -> str | None:
    from .patch import eligible

    return eligible(run)


def _apply(run: Run) -> None:
    from .patch import apply

    apply(run)


OPTIMIZATION = Optimization(
    name="rms_norm",
    summary="every RMSNorm in one Triton kernel each way, the first residual addition of Qwen3.5's layers and that of its "
    "gradient included",
    exactness=Exactness.ROUNDING,
    why_exact=(
        "the same formula; forward it rounds where PyTorch rounds, and only squares are added up in another order; backward "
        "the gradient of x is rounded once, with the residual's share in it, where PyTorch rounds each part and their sum, "
        "and the gradient of the weight is a sum of fp32 products in another order, which PyTorch rounds first for norms "
        "that are not zero-centred"
    ),
    eligible=_eligible,
    apply=_apply,
    op=norm_op(*WORKLOADS),
    needs=Needs(triton=True),
    source=("Zhang and Sennrich 2019, Root Mean Square Layer Normalization, https://arxiv.org/abs/1910.07467",),
)
