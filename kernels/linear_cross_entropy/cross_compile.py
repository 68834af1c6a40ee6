"""The row kernel as a launch over a vocabulary divisible by 16 compiles it, with and without the gradient; the kernel that
adds a trained head's gradient to the optimizer's sum, or writes it there."""

from __future__ import annotations

from kernels.cross_compile import CompileCase, Expected

from . import kernel

# 128 registers: 2 blocks of 8 warps on an SM, each of which reads 32 logits a thread at a time
EXPECTED = Expected(registers=128)

ROWS = tuple(
    CompileCase(
        name=f"{'loss and gradient' if gradient else 'loss'}, {dtype}",
        kernel=kernel._row_kernel,
        signature={
            "p_logits": f"*{dtype}", "p_labels": "*i64", "p_losses": "*fp32", "rows": "i32", "vocabulary": "i32",
        },
        expected=EXPECTED,
        constexprs={"GRADIENT": gradient, "PRECISE": dtype == "fp32", "ROWS": 1, "BLOCK": kernel.BLOCK},
        multiples_of_16=("vocabulary",),
        options={"num_warps": kernel.WARPS},
    )
    for gradient in (False, True)
    for dtype in ("bf16", "fp32")
)  # fmt: skip

SCALES = tuple(
    CompileCase(
        name=f"trained head's gradient, {'added' if add else 'written'}",
        kernel=kernel._scale_kernel,
        signature={"p_gradient": "*fp32", "p_factor": "*fp32", "p_total": "*fp32", "size": "i32"},
        expected=Expected(registers=64, narrow_accesses=1),  # the factor
        constexprs={"ADD": add, "BLOCK": kernel.SCALE_BLOCK},
        multiples_of_16=("size",),
        options={"num_warps": kernel.SCALE_WARPS},
    )
    for add in (False, True)
)

CASES = (*ROWS, *SCALES)
