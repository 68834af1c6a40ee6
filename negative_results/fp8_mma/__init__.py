"""LoRA's frozen base products in e4m3, with a scale for each row of both sides."""

from kernels.contract import Exactness, Needs, Optimization, Workload

from . import op, patch

OPTIMIZATION = Optimization(
    name="fp8_mma",
    summary="the frozen base products of LoRA layers, forward and dx, on e4m3 tensor cores with a scale for each row",
    exactness=Exactness.APPROX,
    why_exact="it is not: activations, gradients and weights are rounded to three bits of mantissa. What is exact is the "
    "emulation: the quantised operands and scales have the reference's bits, and so has the product wherever its partial "
    "sums are exactly representable",
    eligible=patch.eligible,
    apply=patch.apply,
    op=op.linear_op(
        Workload("gate_proj 2B", {"T": 5376, "D_in": 2048, "D_out": 6144}),
        Workload("down_proj 2B", {"T": 5376, "D_in": 6144, "D_out": 2048}),
        Workload("q_proj 2B, short", {"T": 512, "D_in": 2048, "D_out": 4096}),
        Workload("small", {"T": 96, "D_in": 64, "D_out": 160}, small=True),
        Workload("ragged", {"T": 37, "D_in": 48, "D_out": 80}, small=True),
    ),
    needs=Needs(cuda=True, triton=True, capability=((8, 9), (12, 1))),
    conflicts=("lora_matmul", "static_lora"),
    source=(
        "Micikevicius et al. 2022, FP8 Formats for Deep Learning, arXiv 2209.05433",
        "PTX ISA, mma.sync with .kind::f8f6f4",
        "Xie et al. 2025, MMA-Sim, on what tensor cores add up in: arXiv 2511.10909",
    ),
)
