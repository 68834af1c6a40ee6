"""Head and loss in chunks, with the head's weight gradient added up in bf16."""

from dataclasses import replace

from kernels.contract import Exactness, Fails, Optimization, Workload
from kernels.supervised_logits.op import loss_head_op

from . import kernel, patch

SMALL = {"B": 2, "L": 72, "D": 16, "V": 509, "trained": 1}
WORKLOADS = (
    Workload("2B trained head, all supervised", {"B": 1, "L": 5376, "D": 2048, "V": 248_320, "S": 5375, "trained": 1}),
    Workload("small, all supervised", SMALL | {"S": 142}, "float32", small=True),
    Workload("small, ragged", {"B": 3, "L": 131, "D": 29, "V": 1021, "S": 379, "trained": 1}, "float32", small=True),
)

OPTIMIZATION = Optimization(
    name="bf16_head_gradient",
    summary="head and loss in small chunks of rows; the weight's gradient is added up over them in the weight's dtype",
    exactness=Exactness.ROUNDING,
    why_exact="the same function; the weight's gradient is a sum over chunks in the compute dtype, rounded at each of them",
    eligible=patch.eligible,
    apply=patch.apply,
    op=replace(loss_head_op(*WORKLOADS), candidate=kernel.head),
    conflicts=("filtered_cross_entropy", "linear_cross_entropy", "supervised_logits"),
    source=("chunks of logits whose gradient is taken in forward: Liger Kernel, https://arxiv.org/abs/2410.10989",),
    fails=Fails(arm=("bfloat16",), op=("bfloat16",)),
)
