"""The products of linear layers through tensor descriptors, where they beat cuBLAS. See the README.

Nothing here imports triton: a box without a GPU sets TRITON_INTERPRET first, and the kernel is imported on first use.
"""

from kernels.contract import Exactness, Optimization, Workload
from negative_results.sm121a_matmul.op import FULL, matmul_op

from . import patch

OPTIMIZATION = Optimization(
    name="tma_matmul",
    summary="products of linear layers by a persistent TMA matmul, where it was measured to beat cuBLAS",
    exactness=Exactness.ROUNDING,
    why_exact="the same products from the same operands, summed in fp32 and rounded once; the terms of a sum are added in "
    "another order than in cuBLAS",
    eligible=patch.eligible,
    apply=patch.apply,
    op=matmul_op(
        patch.ENGINE,
        Workload("ragged", {"T": 37, "D_in": 56, "D_out": 24} | FULL, "float32", small=True),
        Workload("ragged, more than a block", {"T": 131, "D_in": 72, "D_out": 200} | FULL, "float32", small=True),
    ),
    needs=patch.ENGINE.needs,
    conflicts=("full_ft_linear", "lora_matmul", "static_lora"),
    source=(
        "Triton's persistent matmul: https://triton-lang.org/main/getting-started/tutorials/09-persistent-matmul.html",
        "cp.async.bulk.tensor and its alignment: PTX ISA, tensors",
    ),
)
