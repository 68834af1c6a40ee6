"""The gated delta rule's backward within chunks as one kernel, beside FLA's for the rest."""

from __future__ import annotations

from dataclasses import replace

import torch

from kernels.contract import Exactness, Optimization
from kernels.kept_delta_states import OPTIMIZATION as KEPT
from loop.delta_net import Pack

from . import patch


def _candidate(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, pack: Pack
) -> torch.Tensor:
    from .kernel import chunked_delta_rule

    return chunked_delta_rule(q, k, v, g, beta, pack)


OPTIMIZATION = Optimization(
    name="chunk_delta_backward",
    summary="kept_delta_states, with all of its backward that stays within a chunk in one kernel",
    exactness=Exactness.ROUNDING,
    why_exact="the products and sums of FLA's two kernels and four additions, of the same numbers; sums that those round "
    "between them stay in fp32 here",
    eligible=patch.eligible,
    apply=patch.apply,
    op=replace(KEPT.op, candidate=_candidate),
    needs=replace(KEPT.needs, triton=True, capability=((9, 0), (9, 0))),
    conflicts=("ssm_fast_path", "kept_delta_states"),
    source=KEPT.source,
)
