"""The vocabulary product and its cross-entropy in chunks of rows: the logits of a pack are never there all at once.

Nothing here imports triton: a box without a GPU sets TRITON_INTERPRET first, and the kernel is imported on first use.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kernels.contract import Exactness, Needs, Optimization, Workload
from kernels.supervised_logits.op import loss_head_op

from . import patch

if TYPE_CHECKING:
    import torch
    from torch import nn

    from loop.batch import PackedBatch

PACK_2B = {"B": 1, "L": 5376, "D": 2048, "V": 248_320}
SMALL = {"B": 2, "L": 72, "D": 64, "V": 509}
WORKLOADS = (
    Workload("2B head, all supervised", PACK_2B | {"S": 5375, "trained": 0}),
    Workload("2B head, half supervised", PACK_2B | {"S": 2688, "trained": 0}),
    Workload("2B trained head, all supervised", PACK_2B | {"S": 5375, "trained": 1}),
    Workload("small, frozen head", SMALL | {"S": 71, "trained": 0}, "float32", small=True),
    Workload("small, trained head", SMALL | {"S": 71, "trained": 1}, "float32", small=True),
    Workload("small, all supervised", SMALL | {"S": 142, "trained": 1}, "float32", small=True),
    Workload("small, ragged", {"B": 1, "L": 131, "D": 37, "V": 1021, "S": 130, "trained": 1}, "float32", small=True),
    Workload("small, few supervised", SMALL | {"S": 17, "trained": 1}, "float32", small=True),
    Workload("small, none supervised", SMALL | {"S": 0, "trained": 1}, "float32", small=True),
)


def _candidate(model: nn.Module, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    from .kernel import linear_cross_entropy_head

    return linear_cross_entropy_head(model, hidden, batch)


OPTIMIZATION = Optimization(
    name="linear_cross_entropy",
    summary="vocabulary product, softmax, loss and gradients in chunks of supervised rows, logits never kept",
    exactness=Exactness.ROUNDING,
    why_exact=(
        "the same products, with logits in the compute dtype and softmax and loss in fp32; each row's exponentials and the "
        "loss are summed in another order, d weight is summed over chunks in fp32, and the incoming gradient is multiplied "
        "after the two backward products, which are still in fp32 there, and not before them; a trained weight's gradient "
        "is not rounded on its way to the optimizer's fp32 sum"
    ),
    eligible=patch.eligible,
    apply=patch.apply,
    op=replace(loss_head_op(*WORKLOADS), candidate=_candidate),
    needs=Needs(triton=True),
    conflicts=("supervised_logits",),
    source=(
        "chunks of logits whose gradient is taken in forward: Liger Kernel, https://arxiv.org/abs/2410.10989",
        "the largest value and the sum of exponentials in one pass: https://arxiv.org/abs/1805.02867",
    ),
)
