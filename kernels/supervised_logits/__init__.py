"""Logits only for the positions that are supervised."""

from kernels.contract import Exactness, Optimization
from kernels.supervised_logits import patch

OPTIMIZATION = Optimization(
    name="supervised_logits",
    summary="the vocabulary product and the loss run on supervised positions only",
    exactness=Exactness.ROUNDING,
    why_exact="unsupervised positions have loss and gradient exactly zero; the products over fewer rows may be blocked, "
    "and the loss summed, in another order",
    eligible=patch.eligible,
    apply=patch.apply,
    source=("the same idea as `logits_to_keep` in transformers' generation",),
)
