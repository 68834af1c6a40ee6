"""FLA's delta rule with what its forward makes kept for backward."""

from __future__ import annotations

from dataclasses import replace

import torch

from kernels.contract import Exactness, Optimization
from kernels.ssm_fast_path import OPTIMIZATION as SSM_FAST_PATH
from loop.delta_net import Pack

from . import patch


def _candidate(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, pack: Pack
) -> torch.Tensor:
    from .kernel import kept_delta_rule

    return kept_delta_rule(q, k, v, g, beta, pack)


OPTIMIZATION = Optimization(
    name="kept_delta_states",
    summary="ssm_fast_path, with the states and new values of FLA's forward kept instead of computed again in backward",
    exactness=Exactness.ROUNDING,
    why_exact="the kernels of ssm_fast_path on the same inputs in the same order, so its bits; beside PyTorch it rounds as "
    "that does: " + SSM_FAST_PATH.why_exact,
    eligible=patch.eligible,
    apply=patch.apply,
    op=replace(SSM_FAST_PATH.op, candidate=_candidate),
    needs=SSM_FAST_PATH.needs,
    conflicts=("ssm_fast_path",),
    source=SSM_FAST_PATH.source,
)
