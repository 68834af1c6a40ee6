"""The forward kernel as a launch at the 2B shape compiles it; its backward is silu_mul's."""

from __future__ import annotations

from kernels.cross_compile import CompileCase, Expected

from . import kernel

POINTERS = ("p_x", "p_gate_weight", "p_up_weight", "p_y", "p_gate", "p_up")

CASES = tuple(
    CompileCase(
        name=f"forward, {dtype}{', gate and up kept' if keep else ''}",
        kernel=kernel._forward_kernel,
        signature={pointer: f"*{dtype}" for pointer in POINTERS} | dict.fromkeys("TID", "i32"),
        # 192: one block of 8 warps on an SM. Accumulators take 64, what is on its way to the tensor cores takes the rest
        expected=Expected(registers=192, narrow_accesses=0),
        constexprs=(kernel.TILES_FP32 if dtype == "fp32" else kernel.TILES) | {"KEEP": keep},
        multiples_of_16=tuple("TID"),
        options={"num_warps": kernel.WARPS, "num_stages": kernel.STAGES},
    )
    for dtype in ("bf16", "fp32")
    for keep in (False, True)
)
