"""Qwen3.5's gated-delta layers through flash-linear-attention's kernels."""

from kernels.contract import Exactness, Needs, Optimization, Workload

from . import op, patch

LAYER_2B = {"T": 5376, "HK": 16, "HV": 16, "K": 128, "V": 128}

OPTIMIZATION = Optimization(
    name="ssm_fast_path",
    summary="delta rule and causal convolution through FLA's Triton kernels, document boundaries as cu_seqlens",
    exactness=Exactness.ROUNDING,
    why_exact="the same chunked recurrence and convolution; FLA keeps intermediate products in bf16 where PyTorch upcasts "
    "to fp32, and sums within a chunk in another order",
    eligible=patch.eligible,
    apply=patch.apply,
    op=op.delta_rule_op(
        (Workload("2B layer, twelve documents", LAYER_2B), (1536, 1024, 768, *(256,) * 7, 192, 64)),
        (Workload("2B layer, one document", LAYER_2B), (5376,)),
        (Workload("small, ragged", {"T": 300, "HK": 2, "HV": 2, "K": 64, "V": 64}, small=True), (1, 2, 3, 64, 65, 130, 35)),
        (Workload("small, shared keys", {"T": 160, "HK": 2, "HV": 4, "K": 64, "V": 64}, small=True), (63, 97)),
    ),
    needs=Needs(cuda=True, triton=True, packages=("fla",), known_wrong=patch.known_wrong),
    source=(
        "Gated Delta Networks: arXiv 2412.06464",
        "flash-linear-attention 0.6, ops/gated_delta_rule, modules/causal_conv1d",
    ),
)
