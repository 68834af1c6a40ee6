"""Logits only for the positions that are supervised."""

from kernels.contract import Exactness, Optimization, Workload

from . import op, patch

SMALL = {"B": 2, "L": 72, "D": 64, "V": 509}

OPTIMIZATION = Optimization(
    name="supervised_logits",
    summary="the vocabulary product and the loss run on supervised positions only",
    exactness=Exactness.ROUNDING,
    why_exact="unsupervised positions have loss and gradient exactly zero; the products over fewer rows may be blocked, "
    "and the loss summed, in another order",
    eligible=patch.eligible,
    apply=patch.apply,
    op=op.loss_head_op(
        Workload("2B head, half supervised", {"B": 1, "L": 5376, "D": 2048, "V": 248_320, "S": 2688, "trained": 0}),
        Workload("2B head, one in eight", {"B": 1, "L": 5376, "D": 2048, "V": 248_320, "S": 672, "trained": 0}),
        Workload("small, half supervised", SMALL | {"S": 71, "trained": 0}, "float32", small=True),
        Workload("small, trained head", SMALL | {"S": 17, "trained": 1}, "float32", small=True),
        Workload("small, all supervised", SMALL | {"S": 142, "trained": 1}, "float32", small=True),
        Workload("small, one supervised", SMALL | {"S": 1, "trained": 1}, "float32", small=True),
        Workload("small, none supervised", SMALL | {"S": 0, "trained": 1}, "float32", small=True),
    ),
    source=("the same idea as `logits_to_keep` in transformers' generation",),
)
