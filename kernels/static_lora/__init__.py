"""LoRA as one static module instead of PEFT's dispatching layer."""

from kernels.contract import Exactness, Optimization, Workload

from . import op, patch

OPTIMIZATION = Optimization(
    name="static_lora",
    summary="PEFT's lora.Linear replaced by a module with nothing to decide at run time",
    exactness=Exactness.BITWISE,
    why_exact="the same products, scaling and sum in the same order and dtypes; only Python between them is gone",
    eligible=patch.eligible,
    apply=patch.apply,
    op=op.lora_op(
        Workload("small", {"T": 96, "D_in": 64, "D_out": 160, "R": 8}, "float32", small=True),
        Workload("ragged", {"T": 37, "D_in": 48, "D_out": 24, "R": 3}, "float32", small=True),
        Workload("gate_proj 2B", {"T": 5376, "D_in": 2048, "D_out": 6144, "R": 128}),
        Workload("q_proj short", {"T": 512, "D_in": 2048, "D_out": 4096, "R": 128}),
    ),
    source=("LoRA: arXiv 2106.09685", "PEFT's tuners/lora/layer.py, whose arithmetic it keeps"),
)
