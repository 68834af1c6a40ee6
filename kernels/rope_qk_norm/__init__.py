"""RMSNorm and rotary embedding of query and key heads in one launch each way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.contract import Exactness, Needs, Optimization, Workload

from .op import rope_op

if TYPE_CHECKING:
    from loop.run import Run

QWEN35 = {"T": 5376, "H": 8, "KV": 2, "D": 256, "R": 64, "zero_centred": 1, "gated": 1}
QWEN3 = {"T": 4096, "H": 32, "KV": 8, "D": 128, "R": 128, "zero_centred": 0, "gated": 0}
TRAINED, FROZEN = {"trained": 1}, {"trained": 0}


def _small(name: str, *sizes: int, zero_centred: int = 1, gated: int = 1, trained: int = 1) -> Workload:
    shape = dict(zip(("T", "H", "KV", "D", "R"), sizes, strict=True))
    forms = {"zero_centred": zero_centred, "gated": gated, "trained": trained}
    return Workload(name, shape | forms, "float32", small=True)


def _eligible(run: Run) -> str | None:
    from .patch import eligible

    return eligible(run)


def _apply(run: Run) -> None:
    from .patch import apply

    apply(run)


OPTIMIZATION = Optimization(
    name="rope_qk_norm",
    summary="RMSNorm per head and rotary embedding of query and key in one Triton kernel each way",
    exactness=Exactness.ROUNDING,
    why_exact=(
        "the same formula, in fp32 and rounded once, where PyTorch rounds behind the norm, behind each product with cosine "
        "and sine and behind their sum, and their gradients likewise; squares are added up in another order, and so are the "
        "weights' gradients, of fp32 products"
    ),
    eligible=_eligible,
    apply=_apply,
    op=rope_op(
        Workload("2B attention, frozen", QWEN35 | FROZEN),
        Workload("2B attention, trained", QWEN35 | TRAINED),
        Workload("2B attention, pack 1024, frozen", QWEN35 | FROZEN | {"T": 1024}),
        Workload("Qwen3 8B attention, trained", QWEN3 | TRAINED),
        _small("small", 40, 4, 2, 32, 8),
        _small("small, ragged", 23, 3, 1, 44, 12),
        _small("small, ragged, frozen", 31, 2, 2, 27, 6, trained=0),
        _small("small, plain, all rotated", 19, 5, 1, 24, 24, zero_centred=0, gated=0),
        _small("small, many rows", 401, 4, 1, 16, 4, gated=0),
    ),
    needs=Needs(triton=True),
    source=(
        "Zhang and Sennrich 2019, Root Mean Square Layer Normalization, https://arxiv.org/abs/1910.07467",
        "Su et al. 2021, RoFormer, https://arxiv.org/abs/2104.09864",
    ),
)
