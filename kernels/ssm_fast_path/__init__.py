"""Qwen3.5's gated-delta layers through flash-linear-attention's kernels."""

from kernels.contract import Exactness, Needs, Optimization
from kernels.ssm_fast_path import patch

OPTIMIZATION = Optimization(
    name="ssm_fast_path",
    summary="delta rule and causal convolution through FLA's Triton kernels, document boundaries as cu_seqlens",
    exactness=Exactness.ROUNDING,
    why_exact="the same chunked recurrence and convolution; FLA keeps intermediate products in bf16 where PyTorch upcasts "
    "to fp32, and sums within a chunk in another order",
    eligible=patch.eligible,
    apply=patch.apply,
    needs=Needs(cuda=True, packages=("fla",)),
    source=(
        "Gated Delta Networks: arXiv 2412.06464",
        "flash-linear-attention 0.6, ops/gated_delta_rule, modules/causal_conv1d",
    ),
)
