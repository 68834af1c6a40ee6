"""An op that claims no more than backward stability: what rounding its inputs does counts as the reference's error."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from abtest.opcheck import check_op, workloads_for
from abtest.verdict import Level
from kernels.contract import Op, Workload
from kernels.registry import discover

CPU = torch.device("cpu")
ROWS, WIDTH = 64, 96
CASE = Workload("two products", {}, dtype="bfloat16", small=True)


def inputs(workload: Workload, device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(device).manual_seed(seed)
    shapes = (ROWS, WIDTH), (WIDTH, WIDTH), (WIDTH, 32)
    return tuple(
        torch.randn(shape, generator=generator).to(getattr(torch, workload.dtype)).requires_grad_() for shape in shapes
    )


def reference(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """fp32 from end to end, and fp64 if it is asked for exactly, as a chunked recurrence in PyTorch is."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) @ a.to(wide) @ b.to(wide)).to(x.dtype)


def handed_on_in_bf16(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return ((x.float() @ a.float()).bfloat16().float() @ b.float()).to(x.dtype)


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.factor, None


def handed_on_with(factor: float, zeroed: bool = False):
    def candidate(x, a, b):
        y = handed_on_in_bf16(Scaled.apply(x, factor), a, b)
        return torch.cat([y[:17], y[17:18] * 0, y[18:]]) if zeroed else y

    return candidate


def judged(candidate, stable: bool, seed: int = 0):
    op = Op(reference, candidate, inputs, (CASE,), lambda w: 1, lambda w: 1, backward_stable=stable)
    return check_op(op, CASE, CPU, seed)


@pytest.mark.parametrize("seed", range(3))
def test_an_intermediate_in_the_inputs_precision_is_what_the_claim_allows_and_no_other(seed):
    assert judged(handed_on_in_bf16, False, seed).verdict.level is Level.FAILED
    report = judged(handed_on_in_bf16, True, seed)
    assert report.verdict.level is Level.ROUNDING, report.verdict.reason
    assert max(quantity.mean_ratio for quantity in report.quantities) > 0.5, "the allowance is out of all proportion"


@pytest.mark.parametrize("candidate", [handed_on_with(1.02), handed_on_with(0.0), handed_on_with(1.0, zeroed=True)])
def test_what_is_wrong_stays_wrong(candidate):
    assert judged(candidate, True).verdict.level is Level.FAILED


def test_the_reference_is_as_close_to_the_truth_as_ever():
    plain, stable = judged(reference, False), judged(reference, True)
    assert plain.verdict.level is stable.verdict.level is Level.BITWISE
    for one, other in zip(plain.quantities, stable.quantities, strict=True):
        assert (one.reference_max_error, one.reference_mean_error) == (other.reference_max_error, other.reference_mean_error)
        assert other.mean_ratio < one.mean_ratio


def test_who_claims_no_more_is_known():
    named = {name for name, item in discover().items() if item.op is not None and item.op.backward_stable}
    assert named == {"ssm_fast_path", "kept_delta_states", "chunk_delta_backward"}


def test_on_a_gpu_every_case_is_judged_in_bf16_and_elsewhere_in_fp32():
    small = dataclasses.replace(CASE, dtype="float32")
    op = Op(reference, reference, inputs, (small, dataclasses.replace(small, small=False)), lambda w: 1, lambda w: 1)
    assert [w.dtype for w in workloads_for(op, torch.device("cuda"))] == ["bfloat16"] * 2
    assert [w.dtype for w in workloads_for(op, CPU)] == ["float32"]
