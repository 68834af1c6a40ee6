"""Every step's change of s B A added to the weight in place: a forward of one product, and sums that round."""

from kernels.contract import Exactness, Fails, Optimization, Workload

from . import op, patch

OPTIMIZATION = Optimization(
    name="merged_lora",
    summary="every step's change of the adapters is added to their base's weight in place; the forward is one product",
    exactness=Exactness.ROUNDING,
    why_exact="the same function of real numbers; W + s B A is a sum over steps in W's dtype, rounded at every one of them",
    eligible=patch.eligible,
    apply=patch.apply,
    op=op.merged_op(
        Workload("small", {"T": 96, "D_in": 64, "D_out": 160, "R": 8, "steps": 30}, "float32", small=True),
        Workload("ragged", {"T": 37, "D_in": 48, "D_out": 24, "R": 3, "steps": 30}, "float32", small=True),
        Workload("gate_proj 2B", {"T": 5376, "D_in": 2048, "D_out": 6144, "R": 128, "steps": 30}),
        Workload("q_proj short", {"T": 512, "D_in": 2048, "D_out": 4096, "R": 128, "steps": 30}),
    ),
    conflicts=("lora_matmul", "static_lora"),
    source=("LoRA, section 4.1, which merges once, for inference: arXiv 2106.09685",),
    fails=Fails(arm=("bfloat16", "float32"), op=("bfloat16", "float32")),
)
