"""LoRA projections of one input, base product included, as one autograd node."""

from kernels.contract import Exactness, Optimization, Workload

from . import op, patch

OPTIMIZATION = Optimization(
    name="lora_matmul",
    summary="base products, adapters and their backward of all projections that share an input as one autograd node, narrow "
    "frozen projections included",
    exactness=Exactness.ROUNDING,
    why_exact="the same products; an adapter's output is scaled and added to the base's inside its own product, not rounded "
    "three times on the way, and dx is the sum of dy W over the projections, then of (s dy B) A, each added inside its "
    "product, where autograd adds rounded products in another order; in half precision a narrow frozen projection is a part "
    "of the adapters' products, whose sums may be taken in another order than those of its own",
    eligible=patch.eligible,
    apply=patch.apply,
    op=op.lora_op(
        Workload("q, k, v 2B", {"T": 5376, "D_in": 2048, "R": 128, "O1": 4096, "O2": 512, "O3": 512}),
        Workload("gate, up 2B", {"T": 5376, "D_in": 2048, "R": 128, "O1": 6144, "O2": 6144}),
        Workload("in_proj 2B", {"T": 5376, "D_in": 2048, "R": 128, "O1": 6144, "O2": 2048, "P1": 16, "P2": 16}),
        Workload("down_proj 2B", {"T": 5376, "D_in": 6144, "R": 128, "O1": 2048}),
        Workload("gate, up 2B, rank 16, short", {"T": 512, "D_in": 2048, "R": 16, "O1": 6144, "O2": 6144}),
        Workload("small", {"T": 96, "D_in": 64, "R": 16, "O1": 160, "O2": 32, "O3": 32}, "float32", small=True),
        Workload("small, low rank", {"T": 96, "D_in": 64, "R": 8, "O1": 160, "O2": 32, "O3": 32}, "float32", small=True),
        Workload("small, frozen", {"T": 96, "D_in": 64, "R": 16, "O1": 160, "P1": 32, "P2": 8}, "float32", small=True),
        Workload("ragged, frozen", {"T": 37, "D_in": 51, "R": 3, "O1": 23, "O2": 9, "P1": 7}, "float32", small=True),
        Workload("ragged", {"T": 37, "D_in": 51, "R": 17, "O1": 23, "O2": 7}, "float32", small=True),
        Workload("ragged, low rank", {"T": 37, "D_in": 51, "R": 3, "O1": 23, "O2": 7}, "float32", small=True),
        Workload("ragged, alone", {"T": 37, "D_in": 29, "R": 5, "O1": 43}, "float32", small=True),
    ),
    conflicts=("static_lora",),
    source=("LoRA: arXiv 2106.09685", "RunLoRA, on the order of LoRA's products: arXiv 2312.03415"),
)
