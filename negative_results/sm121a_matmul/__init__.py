"""The products of linear layers in Triton, with tiles within GB10's limits, where they beat cuBLAS. See the README.

Nothing here imports triton: a box without a GPU sets TRITON_INTERPRET first, and the kernel is imported on first use.
"""

from kernels.contract import Exactness, Optimization, Workload

from . import op, patch

OPTIMIZATION = Optimization(
    name="sm121a_matmul",
    summary="products of linear layers by a Triton matmul within GB10's limits, where it was measured to beat cuBLAS",
    exactness=Exactness.ROUNDING,
    why_exact="the same products from the same operands, summed in fp32 and rounded once; the terms of a sum are added in "
    "another order than in cuBLAS",
    eligible=patch.eligible,
    apply=patch.apply,
    op=op.matmul_op(
        patch.ENGINE,
        Workload("ragged", {"T": 37, "D_in": 51, "D_out": 23} | op.FULL, "float32", small=True),
        Workload("ragged, more than a block", {"T": 131, "D_in": 77, "D_out": 201} | op.FULL, "float32", small=True),
    ),
    needs=patch.ENGINE.needs,
    conflicts=("full_ft_linear", "lora_matmul", "static_lora", "tma_matmul"),
    source=(
        "Triton's grouped program order: https://triton-lang.org/main/getting-started/tutorials/03-matrix-multiplication.html",
        "shared memory a block, by compute capability: CUDA C++ Programming Guide, technical specifications",
    ),
)
