"""Clipping and AdamW in one pass."""

from kernels.contract import Exactness, Needs, Optimization

from . import patch

OPTIMIZATION = Optimization(
    name="fused_adamw",
    summary="clipping and AdamW of all masters in one launch a parameter group instead of a dozen passes over them",
    exactness=Exactness.ROUNDING,
    why_exact="the clipping coefficient has stock's bits and the formula is AdamW's; the mean is a sum of two products "
    "where stock interpolates, a product and a sum may round once, and the order of a few factors differs",
    eligible=patch.eligible,
    apply=patch.apply,
    needs=Needs(triton=True),
    in_update=True,
    source=(
        "Decoupled weight decay regularization: arXiv 1711.05101, algorithm 2",
        "Apex's multi-tensor apply, which PyTorch's fused AdamW follows: https://github.com/pytorch/pytorch/pull/81705",
    ),
)
