"""The product as a launch at the 2B shape compiles it. sm_80 has no e4m3: there the case is the kernel on e5m2, which Triton
raises to fp16, and which the folder's `needs` keeps from ever being launched."""

from __future__ import annotations

from kernels.cross_compile import TARGETS, CompileCase, Expected

from . import kernel

WITH_E4M3 = tuple(target for target in TARGETS if target != "sm_80")


def _case(operand: str, result: str, targets: tuple[str, ...]) -> CompileCase:
    pointers = {"p_x": f"*{operand}", "p_weight": f"*{operand}", "p_y": f"*{result}"}
    return CompileCase(
        name=f"{operand} to {result}",
        kernel=kernel._matmul_kernel,
        signature=pointers | {"p_x_scale": "*fp32", "p_weight_scale": "*fp32"} | dict.fromkeys("TOD", "i32"),
        expected=Expected(registers=192),  # one block of 8 warps on an SM; scales are read 4 bytes at a time
        constexprs=kernel.TILES,
        multiples_of_16=tuple("TOD"),
        options={"num_warps": kernel.WARPS, "num_stages": kernel.STAGES},
        targets=targets,
    )


CASES = (
    *(_case("fp8e4nv", result, WITH_E4M3) for result in ("bf16", "fp32")),
    _case("fp8e5", "bf16", ("sm_80",)),
)
