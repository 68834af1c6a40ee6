"""The op check must catch what goes wrong in kernels: every defect here is planted, and each must turn the verdict red."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from abtest.opcheck import check_op
from abtest.quantity import compare, same_bits
from abtest.verdict import Level
from kernels.contract import Exactness, Op, Workload

CPU = torch.device("cpu")
ROWS, WIDTH = 64, 96


def gate_and_up(workload: Workload, device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(device).manual_seed(seed)
    shape, dtype = (ROWS, WIDTH), getattr(torch, workload.dtype)
    return tuple(torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_() for _ in range(2))


def hidden_and_linear(workload: Workload, device: torch.device, seed: int) -> tuple[torch.Tensor, nn.Module]:
    torch.manual_seed(seed)
    hidden = torch.randn(ROWS, WIDTH, dtype=getattr(torch, workload.dtype), device=device, requires_grad=True)
    return hidden, nn.Linear(WIDTH, 80, device=device, dtype=hidden.dtype)


def reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def project(hidden: torch.Tensor, linear: nn.Module) -> torch.Tensor:
    return linear(hidden)


def judge(candidate, exactness=Exactness.ROUNDING, dtype="float32", of=reference, inputs=gate_and_up):
    workload = Workload("planted", {}, dtype=dtype, small=True)
    op = Op(of, candidate, inputs, (workload,), lambda w: 1, lambda w: 1)
    return check_op(op, workload, CPU, 0, exactness).verdict


def failed_checks(verdict) -> set[str]:
    assert verdict.level is Level.FAILED, verdict
    return {check.name for check in verdict.checks if not check.passed}


class Defective(torch.autograd.Function):
    """silu(gate) * up by hand, with one planted defect in the forward or the backward."""

    @staticmethod
    def forward(ctx, gate, up, defect):
        ctx.save_for_backward(gate, up)
        ctx.defect = defect
        y = torch.empty_like(gate)
        y.copy_(F.silu(gate) * up)
        if defect == "one row zeroed":
            y[17] = 0
        if defect == "NaN":
            y[3, 5] = float("nan")
        if defect == "Inf":
            y[3, 5] = float("inf")
        if defect == "tail not written":
            written = y.clone()
            y = torch.empty_like(gate)
            y.view(-1)[:-7] = written.view(-1)[:-7]
        if defect == "gate overwritten":
            gate.data[0, 0] += 1
        return y

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        if ctx.defect == "unpacked twice":
            gate, up = ctx.saved_tensors
        sigmoid = torch.sigmoid(gate)
        dgate, dup = dy * up * sigmoid * (1 + gate * (1 - sigmoid)), dy * F.silu(gate)
        if ctx.defect == "dgate without its second term":
            dgate = dy * up * sigmoid
        if ctx.defect == "dy overwritten":
            dy.mul_(2)
        if ctx.defect == "saved up overwritten":
            up.data.zero_()
        return dgate, None if ctx.defect == "no dup" else dup, None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_against_itself_is_bitwise(dtype):
    assert judge(reference, Exactness.BITWISE, dtype).level is Level.BITWISE


def test_a_correct_rewrite_passes():
    verdict = judge(lambda gate, up: Defective.apply(gate, up, None))
    assert verdict.level.lossless, verdict.reason


@pytest.mark.parametrize(
    ("defect", "check"),
    [
        ("one row zeroed", "max ratio"),
        ("NaN", "finite"),
        ("Inf", "finite"),
        ("tail not written", "fully written"),
        ("gate overwritten", "inputs unmodified"),
        ("dgate without its second term", "mean ratio"),
        ("dy overwritten", "inputs unmodified"),
        ("saved up overwritten", "inputs unmodified"),
        ("unpacked twice", "runs"),  # with checkpointing, which a second backward alone does not show
        ("no dup", "gradients"),
    ],
)
def test_planted_defects_fail(defect, check):
    assert check in failed_checks(judge(lambda gate, up: Defective.apply(gate, up, defect)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_scale_of_1_004_fails_by_its_mean(dtype):
    assert "mean ratio" in failed_checks(judge(lambda gate, up: 1.004 * reference(gate, up), dtype=dtype))


def test_a_detached_output_fails():
    assert failed_checks(judge(lambda gate, up: reference(gate, up).detach())) == {"gradients"}


@pytest.mark.parametrize(
    "candidate",
    [
        lambda gate, up: reference(gate, up)[:-1],
        lambda gate, up: reference(gate, up).double(),
        lambda gate, up: (reference(gate, up), gate),
    ],
    ids=["shape", "dtype", "number"],
)
def test_another_structure_fails(candidate):
    assert failed_checks(judge(candidate)) == {"structure"}


def test_a_candidate_that_raises_fails():
    assert failed_checks(judge(lambda gate, up: reference(gate, up[:, :-1]))) == {"runs"}


def test_a_second_call_with_other_bits_fails():
    calls = itertools.count()
    verdict = judge(lambda gate, up: reference(gate, up) * (1 + 1e-7 * (next(calls) % 2)))
    assert "second call" in failed_checks(verdict)


def test_a_bitwise_claim_needs_the_same_bits():
    def product(gate, up):
        return (F.silu(gate.float()) * up.float()).to(gate.dtype)  # rounds once: nearer to the truth, other bits

    assert judge(product, Exactness.ROUNDING, "bfloat16").level is Level.ROUNDING
    assert failed_checks(judge(product, Exactness.BITWISE, "bfloat16")) == {"bitwise"}


def test_an_approximation_keeps_its_name_but_not_with_nan():
    def coarse(gate, up):
        return F.silu(gate) * up * 1.01

    assert judge(coarse, Exactness.APPROX).level is Level.APPROX
    verdict = judge(lambda gate, up: Defective.apply(gate, up, "NaN"), Exactness.APPROX)
    assert verdict.level is Level.FAILED


class ScaledWeightGradient(torch.autograd.Function):
    """x W^T + b whose weight gradient is off: the output and dx are perfect."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, wrong):
        ctx.save_for_backward(hidden, weight)
        ctx.wrong = wrong
        return F.linear(hidden, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        hidden, weight = ctx.saved_tensors
        dweight = dy.t() @ hidden
        if ctx.wrong == "accumulated in bf16":
            dweight = sum(
                part.t().bfloat16() @ rows.bfloat16() for part, rows in zip(dy.split(8), hidden.split(8), strict=True)
            )
        if ctx.wrong == "transposed block":
            dweight[:8, :8] = dweight[:8, :8].t().clone()
        return dy @ weight, dweight.to(weight.dtype), dy.sum(0), None


@pytest.mark.parametrize(("wrong", "green"), [(None, True), ("accumulated in bf16", False), ("transposed block", False)])
def test_a_module_s_weight_gradient_is_compared(wrong, green):
    def candidate(hidden, linear):
        return ScaledWeightGradient.apply(hidden, linear.weight, linear.bias, wrong)

    verdict = judge(candidate, of=project, inputs=hidden_and_linear)
    assert verdict.level.lossless is green, verdict.reason
    if not green:
        assert "linear.weight" in verdict.reason


def test_a_modified_module_fails():
    def candidate(hidden, linear):
        output = project(hidden, linear)
        linear.bias.data.add_(1)
        return output

    assert "inputs unmodified" in failed_checks(judge(candidate, of=project, inputs=hidden_and_linear))


@dataclass(frozen=True)
class Scaled:
    """An input that is neither tensor nor module."""

    rows: torch.Tensor
    factor: torch.Tensor
    name: str = "x"


def gate_and_scaled(workload: Workload, device: torch.device, seed: int) -> tuple[torch.Tensor, Scaled]:
    gate, factor = gate_and_up(workload, device, seed)
    return gate, Scaled(torch.arange(0, ROWS, 2), factor)


def gathered(gate: torch.Tensor, scaled: Scaled) -> torch.Tensor:
    return (F.silu(gate) * scaled.factor).index_select(0, scaled.rows)


def test_a_dataclass_s_gradient_is_compared():
    def wrong(gate, scaled):
        return gathered(gate, Scaled(scaled.rows, scaled.factor * 1.0 + 0.01 * (scaled.factor - scaled.factor.detach())))

    assert judge(gathered, Exactness.BITWISE, of=gathered, inputs=gate_and_scaled).level is Level.BITWISE
    verdict = judge(wrong, of=gathered, inputs=gate_and_scaled)
    assert verdict.level is Level.FAILED and "scaled.factor" in verdict.reason


def test_a_modified_dataclass_fails():
    def candidate(gate, scaled):
        output = gathered(gate, scaled)
        scaled.rows.data[-1] = 0
        return output

    assert "inputs unmodified" in failed_checks(judge(candidate, of=gathered, inputs=gate_and_scaled))


def test_the_truth_is_fp64_even_where_the_reference_says_fp32():
    def upcast(gate, up):
        return (F.silu(gate.float()) * up.to(torch.float32)).to(gate.dtype)

    inputs = gate_and_up(Workload("x", {}, "float32"), CPU, 0)
    op = Op(upcast, upcast, gate_and_up, (), lambda w: 1, lambda w: 1)
    (output, *_) = check_op(op, Workload("planted", {}, "float32"), CPU).quantities
    truth = reference(*(value.double() for value in inputs))
    assert output.reference_max_error == (upcast(*inputs).double() - truth).abs().max().item() > 0


def test_a_comparison_that_cannot_be_trusted_is_invalid():
    draws = itertools.count()

    def drifting(workload, device, seed):
        return gate_and_up(workload, device, seed + next(draws))

    assert judge(reference, inputs=drifting).level is Level.INVALID
    assert judge(reference, of=lambda gate, up: reference(gate, up) / 0.0).level is Level.INVALID
    assert judge(reference, of=lambda gate, up: reference(gate, up).detach()).level is Level.INVALID


def test_ratios_where_the_reference_is_exact():
    truth = torch.arange(1, 129, dtype=torch.float64)
    exact = truth.float()
    one_ulp = exact.clone()
    one_ulp[-1] = torch.nextafter(one_ulp[-1], torch.tensor(1e9))
    scaled = exact * 1.000001
    assert compare("q", truth, exact, exact).within_limits
    assert compare("q", torch.zeros(8, dtype=torch.float64), torch.zeros(8), torch.zeros(8)).within_limits
    assert not compare("q", torch.zeros(8, dtype=torch.float64), torch.zeros(8), torch.full((8,), 1e-30)).within_limits
    assert not compare("q", truth, exact, scaled).within_limits
    assert compare("q", truth, exact, one_ulp).max_ratio > 2
    assert not compare("q", truth, exact, exact * float("nan")).within_limits


def test_bits_are_bits():
    assert same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.int32))


def test_the_check_leaves_the_random_state_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    judge(reference)
    assert torch.equal(torch.get_rng_state(), state)
