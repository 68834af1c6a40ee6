"""MLPs through torch.compile with max-autotune, CUDA graphs included."""

from kernels.contract import Exactness, Fails, Needs, Optimization

from . import patch

OPTIMIZATION = Optimization(
    name="compiled_max_autotune",
    summary="every gated MLP compiled by inductor with max-autotune: matmuls chosen by timing, and CUDA graphs a layer",
    exactness=Exactness.ROUNDING,
    why_exact="the same operations; inductor fuses elementwise ones, which then round to the compute dtype less often, and "
    "may choose another matmul, which sums in another order",
    eligible=patch.eligible,
    apply=patch.apply,
    needs=Needs(cuda=True, triton=True),
    conflicts=("contiguous_linear_patch", "elementwise_warps", "fused_swiglu_matmul", "silu_mul", "triton_fp8_dot"),
    fails=Fails(arm=("bfloat16",)),  # a backward through one graph can be asked for once alone
    recipe={"gradient_checkpointing": False},
    source=("torch.compile: https://docs.pytorch.org/docs/stable/generated/torch.compile.html",),
)
