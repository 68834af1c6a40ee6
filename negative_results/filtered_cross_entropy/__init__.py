"""Head and loss in chunks, without the gradient where softmax is small."""

from dataclasses import replace

from kernels.contract import Exactness, Fails, Optimization, Workload
from kernels.supervised_logits.op import loss_head_op

from . import kernel, patch

PACK_2B = {"B": 1, "L": 5376, "D": 2048, "V": 248_320}
SMALL = {"B": 2, "L": 72, "D": 64, "V": 16_381}  # a softmax of random logits is below 2^-12 nearly everywhere
WORKLOADS = (
    Workload("2B head, half supervised", PACK_2B | {"S": 2688, "trained": 0}),
    Workload("2B trained head, all supervised", PACK_2B | {"S": 5375, "trained": 1}),
    Workload("small, frozen head", SMALL | {"S": 71, "trained": 0}, "float32", small=True),
    Workload("small, trained head", SMALL | {"S": 142, "trained": 1}, "float32", small=True),
)

OPTIMIZATION = Optimization(
    name="filtered_cross_entropy",
    summary="head and loss in chunks; values of the logits' gradient below 2^-12 are left out",
    exactness=Exactness.ROUNDING,
    why_exact="the claim as it is made: beside a row's larger values, those below 2^-12 vanish in the rounding of bf16",
    eligible=patch.eligible,
    apply=patch.apply,
    op=replace(loss_head_op(*WORKLOADS), candidate=kernel.head),
    conflicts=("bf16_head_gradient", "linear_cross_entropy", "supervised_logits"),
    source=("Cut Your Losses in Large-Vocabulary Language Models, section 4.3: https://arxiv.org/abs/2411.09009",),
    fails=Fails(arm=("bfloat16", "float32"), op=("bfloat16", "float32")),
)
