"""The last layer's MLP only for the positions that are supervised."""

from kernels.contract import Exactness, Op, Optimization, Workload

from . import op, patch
from .kernel import mlp_of_rows
from .reference import mlp_then_rows

SMALL = {"B": 2, "L": 72, "D": 64, "F": 192}
OF_2B = {"B": 1, "L": 5376, "D": 2048, "F": 6144}

OPTIMIZATION = Optimization(
    name="supervised_mlp",
    summary="the last layer's MLP, forward and backward, runs on supervised positions only",
    exactness=Exactness.ROUNDING,
    why_exact="behind the last attention a position is on its own, so what an unsupervised one gets from the MLP reaches no "
    "loss, and its gradient is exactly zero; the weights' gradients sum over fewer rows, in another order",
    eligible=patch.eligible,
    apply=patch.apply,
    op=Op(
        mlp_then_rows,
        mlp_of_rows,
        op.inputs,
        (
            Workload("2B MLP, half supervised", OF_2B | {"S": 2688, "trained": 0}),
            Workload("2B MLP, one in eight", OF_2B | {"S": 672, "trained": 0}),
            Workload("2B MLP, half supervised, trained", OF_2B | {"S": 2688, "trained": 1}),
            Workload("small, half supervised", SMALL | {"S": 71, "trained": 0}, "float32", small=True),
            Workload("small, trained", SMALL | {"S": 67, "trained": 1}, "float32", small=True),
            Workload("small, all supervised", SMALL | {"S": 144, "trained": 1}, "float32", small=True),
            Workload("small, few supervised", SMALL | {"S": 3, "trained": 1}, "float32", small=True),
            Workload("small, none supervised", SMALL | {"S": 0, "trained": 1}, "float32", small=True),
        ),
        op.bytes_moved,
        op.flops,
    ),
    source=("the argument of `supervised_logits`, one layer further down",),
)
