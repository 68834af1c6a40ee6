"""The silu_mul kernels as a launch on contiguous tensors compiles them, with a size divisible by 16."""

from __future__ import annotations

from kernels.cross_compile import CompileCase, Expected

from . import kernel

POINTERS = {
    kernel._forward_kernel: ("p_gate", "p_up", "p_y"),
    kernel._backward_kernel: ("p_dy", "p_gate", "p_up", "p_dgate", "p_dup"),
}
# 64 registers: 8 blocks of 4 warps on an SM, half of its threads, which is enough to keep memory busy
EXPECTED = Expected(registers=64, shared_bytes=0, narrow_accesses=0)

CASES = tuple(
    CompileCase(
        name=f"{function.__name__.strip('_').removesuffix('_kernel')}, {dtype}",
        kernel=function,
        signature={pointer: f"*{dtype}" for pointer in pointers} | {"size": "i32"},
        expected=EXPECTED,
        constexprs={"BLOCK": kernel.BLOCK},
        multiples_of_16=("size",),
        options={"num_warps": kernel.WARPS},
    )
    for function, pointers in POINTERS.items()
    for dtype in ("bf16", "fp16", "fp32")
)
