"""Weights transposed into fresh memory at every call of a linear layer."""

from kernels.contract import Exactness, Op, Optimization, Workload

from . import kernel, patch, reference

WORKLOADS = (
    Workload("gate_proj 2B", {"T": 5376, "D_in": 2048, "D_out": 6144, "trained": 0, "bias": 0}),
    Workload("gate_proj 2B, trained", {"T": 5376, "D_in": 2048, "D_out": 6144, "trained": 1, "bias": 0}),
    Workload("k_proj 2B", {"T": 5376, "D_in": 2048, "D_out": 512, "trained": 0, "bias": 0}),
    Workload("few rows", {"T": 64, "D_in": 2048, "D_out": 6144, "trained": 0, "bias": 0}),
    Workload("small", {"T": 96, "D_in": 64, "D_out": 160, "trained": 1, "bias": 0}, "float32", small=True),
    Workload("small, ragged, bias", {"T": 37, "D_in": 51, "D_out": 23, "trained": 1, "bias": 1}, "float32", small=True),
)

OPTIMIZATION = Optimization(
    name="contiguous_linear_patch",
    summary="every linear layer copies its weight's transpose at each call, so that the product reads contiguous rows",
    exactness=Exactness.ROUNDING,
    why_exact="the same products of the same values; a library may block the sums of another layout in another order",
    eligible=patch.eligible,
    apply=patch.apply,
    op=Op(
        reference=reference.linear,
        candidate=kernel.contiguous_linear,
        inputs=reference.inputs,
        workloads=WORKLOADS,
        bytes_moved=reference.bytes_moved,
        flops=reference.flops,
    ),
    conflicts=(
        "compiled_max_autotune",
        "full_ft_linear",
        "fused_swiglu_matmul",
        "lora_matmul",
        "static_lora",
        "triton_fp8_dot",
    ),
    source=("a weight is [out, in]: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.linear.html",),
)
