"""nn.Linear and nn.Embedding for full fine-tuning: their gradients go straight into the optimizer's fp32 sum."""

from kernels.contract import Exactness, Optimization, Workload

from . import op, patch

OPTIMIZATION = Optimization(
    name="full_ft_linear",
    summary="weight gradients of trained nn.Linear and nn.Embedding go into the optimizer's fp32 sum, in place",
    exactness=Exactness.ROUNDING,
    why_exact="the same three products; the weight's gradient is not rounded to bf16 between its product and the fp32 sum, "
    "it may be added inside the product, and a tied weight's two gradients are added in fp32; layers of one input add to "
    "its gradient inside their products, unrounded",
    eligible=patch.eligible,
    apply=patch.apply,
    op=op.linear_op(
        Workload("gate_proj 2B", {"T": 5376, "D_in": 2048, "D_out": 6144, "held": 0}),
        Workload("down_proj 2B, a later micro-step", {"T": 5376, "D_in": 6144, "D_out": 2048, "held": 1}),
        Workload("k_proj 2B", {"T": 5376, "D_in": 2048, "D_out": 512, "held": 0}),
        Workload("small", {"T": 96, "D_in": 64, "D_out": 160, "held": 0}, "float32", small=True),
        Workload("ragged", {"T": 37, "D_in": 51, "D_out": 23, "held": 0}, "float32", small=True),
        Workload("ragged, a later micro-step", {"T": 37, "D_in": 51, "D_out": 23, "held": 1}, "float32", small=True),
    ),
    source=(
        "Megatron-LM's gradient accumulation fusion: arXiv 1909.08053 and its `--no-gradient-accumulation-fusion`",
        "torch.addmm's `out_dtype`: https://github.com/pytorch/pytorch/pull/150812 and 167931",
    ),
)
