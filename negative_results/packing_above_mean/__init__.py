"""Longer packs than documents need."""

from __future__ import annotations

from kernels.contract import Exactness, Op, Optimization
from kernels.packed_attention.reference import masked_attention

from . import kernel, patch, reference

OPTIMIZATION = Optimization(
    name="packing_above_mean",
    summary="the packs of a micro-step joined into a single one, as many times as long: the same documents, one row",
    exactness=Exactness.ROUNDING,
    why_exact="documents keep their boundaries; attention hides more scores, and a hidden score contributes exactly zero to "
    "the softmax, so only how rows are blocked and in which order products are summed changes",
    eligible=patch.eligible,
    apply=patch.apply,
    op=Op(
        masked_attention,
        kernel.joined_attention,
        reference.inputs,
        reference.WORKLOADS,
        reference.bytes_moved,
        reference.flops,
    ),
    conflicts=("cuda_graphs",),
    source=("Krell et al. 2021, efficient sequence packing without cross-contamination: arXiv 2107.02027",),
    recipe={"data": {"packs_per_micro_step": 2}},
)
