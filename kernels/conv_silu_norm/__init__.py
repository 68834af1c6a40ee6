"""The delta rule's inputs in one launch each way: convolution, SiLU, split and L2 norm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.contract import Exactness, Needs, Optimization, Workload

from .op import mixer_op

if TYPE_CHECKING:
    from loop.run import Run

LAYER_2B = {"T": 5376, "HK": 16, "K": 128, "V": 2048}
TWELVE = (1536, 1024, 768, *(256,) * 7, 192, 64)
TRAINED, FROZEN = {"trained": 1}, {"trained": 0}


def _small(name: str, HK: int, K: int, V: int, documents: tuple[int, ...], trained: bool = True):
    shape = {"T": sum(documents), "HK": HK, "K": K, "V": V, "trained": int(trained)}
    return Workload(name, shape, "float32", small=True), documents


def _eligible(run: Run) -> str | None:
    from .patch import eligible

    return eligible(run)


def _apply(run: Run) -> None:
    from .patch import apply

    apply(run)


OPTIMIZATION = Optimization(
    name="conv_silu_norm",
    summary="causal convolution, SiLU, split and L2 norm in front of the delta rule in one Triton kernel each way",
    exactness=Exactness.ROUNDING,
    why_exact=(
        "the same formula, in fp32 from x to q, k and v and rounded once, where PyTorch rounds behind the convolution and "
        "behind SiLU; so q and k reach the delta rule rounded, as in FLA's, where PyTorch's goes on with the norm in fp32; "
        "backward each gradient is rounded once, and the weight's is a sum of fp32 products in another order"
    ),
    eligible=_eligible,
    apply=_apply,
    op=mixer_op(
        (Workload("2B layer, twelve documents, frozen", LAYER_2B | FROZEN), TWELVE),
        (Workload("2B layer, twelve documents, trained", LAYER_2B | TRAINED), TWELVE),
        (Workload("2B layer, one document, frozen", LAYER_2B | FROZEN), (5376,)),
        (Workload("2B layer, pack 1024, frozen", LAYER_2B | FROZEN | {"T": 1024}), (700, 300, 24)),
        _small("small", 2, 32, 128, (50, 30)),
        _small("small, documents of 1 to 5", 1, 16, 32, (1, 1, 2, 3, 4, 5, 1, 2, 1, 20, 1)),
        _small("small, ragged heads", 3, 20, 50, (17, 1, 19)),
        _small("small, ragged, frozen", 2, 24, 33, (3, 34), trained=False),
    ),
    # Its kernels run in Triton's interpreter, in tests/contract; a whole run there takes minutes, for thousands of programs.
    needs=Needs(cuda=True, triton=True),
    source=(
        "Yang, Kautz and Hatamizadeh 2024, Gated Delta Networks, https://arxiv.org/abs/2412.06464",
        "Dao and Gu 2024, causal-conv1d, https://github.com/Dao-AILab/causal-conv1d",
    ),
)
