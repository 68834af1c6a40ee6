"""Attention within documents only, instead of over the whole pack under a mask: in Triton on a GPU, else in PyTorch."""

from kernels.contract import Exactness, Optimization, Workload

from . import op, patch

HEADS_2B = {"H": 8, "KV": 2, "D": 256}
SMALL = {"B": 1, "H": 4, "KV": 2, "D": 16}

OPTIMIZATION = Optimization(
    name="packed_attention",
    summary="each document attends to itself: flash attention in Triton over the flat pack; no mask, no masked-out scores",
    exactness=Exactness.ROUNDING,
    why_exact="a masked score contributes exactly zero to the softmax, so leaving it out changes only how rows are blocked "
    "and in which order products are summed; dk and dv of query heads that share a key are summed in fp32, and rounded once",
    eligible=patch.eligible,
    apply=patch.apply,
    op=op.attention_op(
        (Workload("2B, twelve documents", {"B": 1, "L": 5376, **HEADS_2B}), (1536, 1024, 768, *(256,) * 7, 192, 64)),
        (Workload("2B, one document", {"B": 1, "L": 5376, **HEADS_2B}), (5376,)),
        (Workload("small, documents of 1 to 3", {**SMALL, "L": 17}, "float32", small=True), (1, 2, 3, 1, 3, 2, 3, 1, 1)),
        (Workload("small, exactly a chunk", {**SMALL, "L": 192}, "float32", small=True), (64, 64, 64)),
        (Workload("small, one long", {**SMALL, "L": 211}, "float32", small=True), (211,)),
        (Workload("small, two packs", {**SMALL, "B": 2, "L": 131}, "float32", small=True), (130, 1, 5, 70, 56)),
        (Workload("small, window", {**SMALL, "L": 227, "W": 33}, "float32", small=True), (150, 20, 33, 24)),
        (Workload("small, as many key heads", {**SMALL, "L": 90, "KV": 4}, "float32", small=True), (65, 25)),
    ),
    source=(
        "variable-length attention as in FlashAttention-2: arXiv 2307.08691",
        "Online normalizer calculation for softmax: arXiv 1805.02867",
    ),
)
