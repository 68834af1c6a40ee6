"""The update's kernel as its two launches compile it: tensors that allow wide loads, and the others."""

from __future__ import annotations

from kernels.cross_compile import CompileCase, Expected

from . import kernel

SCALARS = ("keep", "beta1", "rest1", "beta2", "rest2", "eps")
POINTERS = {"p_tensors": "*i64", "p_factors": "*fp32", "p_chunks": "*i32", "p_clip": "*fp32"}

CASES = tuple(
    CompileCase(
        name=f"update, {'wide loads' if aligned else 'any size and address'}",
        kernel=kernel._update_kernel,
        signature=POINTERS | dict.fromkeys(SCALARS, "fp32"),
        # 64 registers: 8 blocks of 4 warps on an SM, half of its threads. Nine numbers a program come from the tables.
        expected=Expected(registers=64, shared_bytes=0, narrow_accesses=10 if aligned else None),
        constexprs={"BLOCK": kernel.BLOCK, "BLOCKS": kernel.BLOCKS, "COLUMNS": kernel.COLUMNS, "ALIGNED": aligned},
        options={"num_warps": kernel.WARPS},
    )
    for aligned in (True, False)
)
