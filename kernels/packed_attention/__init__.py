"""Attention within documents only, instead of over the whole pack under a mask."""

from kernels.contract import Exactness, Optimization
from kernels.packed_attention import patch

OPTIMIZATION = Optimization(
    name="packed_attention",
    summary="each document attends to itself through PyTorch's causal attention; no pack-wide mask, no masked-out scores",
    exactness=Exactness.ROUNDING,
    why_exact="a masked score contributes exactly zero to the softmax, so leaving it out changes only how rows are blocked "
    "and in which order products are summed",
    eligible=patch.eligible,
    apply=patch.apply,
    source=("variable-length attention as in FlashAttention-2: arXiv 2307.08691",),
)
