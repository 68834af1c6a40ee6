"""Negative results with kernels of their own: right where they claim to be, and refused where they don't fit."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from negative import DEVICE, drawn, outcome, run_of, swapped_alike
from torch import nn

from abtest.opcheck import check_op
from abtest.verdict import Level
from kernels import registry
from kernels.silu_mul.kernel import silu_mul
from kernels.silu_mul.patch import FusedMLP
from negative_results import compiled_max_autotune, elementwise_warps, fused_swiglu_matmul, triton_fp8_dot
from negative_results.compiled_max_autotune.patch import CompiledMLP, announced
from negative_results.elementwise_warps.kernel import CHOICES, silu_mul_with_warps
from negative_results.elementwise_warps.patch import WarpsMLP
from negative_results.fused_swiglu_matmul.kernel import fused_swiglu
from negative_results.fused_swiglu_matmul.patch import SwigluMLP
from negative_results.triton_fp8_dot import kernel as fp8
from negative_results.triton_fp8_dot.patch import projections

# elementwise_warps


@pytest.mark.parametrize("warps", CHOICES)
def test_every_number_of_warps_gives_silu_mul_s_bits(warps):
    gate, up, dy = (drawn(37, 123, seed=seed, scale=3.0) for seed in range(3))
    sides = []
    for function in (lambda: silu_mul(gate, up), lambda: silu_mul_with_warps(gate, up, warps)):
        y = function()
        sides.append((y, *torch.autograd.grad(y, (gate, up), dy.detach())))
    assert all(torch.equal(one, other) for one, other in zip(*sides, strict=True))


def test_warps_that_no_launch_has():
    with pytest.raises(ValueError, match="3 warps"):
        silu_mul_with_warps(drawn(2, 2), drawn(2, 2), 3)
    with pytest.raises(ValueError, match=r"\[2, 2\].*\[4\]"):
        silu_mul_with_warps(drawn(2, 2), drawn(4), 8)
    assert silu_mul_with_warps(drawn(0, 2), drawn(0, 2), 8).shape == (0, 2)


def test_mlps_with_other_warps():
    run = run_of()
    fused = run_of()
    swapped_alike(elementwise_warps.OPTIMIZATION, run, WarpsMLP, 2)
    registry.discover()["silu_mul"].apply(fused)
    assert any(isinstance(module, FusedMLP) for module in fused.model.modules())
    assert all(torch.equal(one, other) for one, other in zip(outcome(run.model), outcome(fused.model), strict=True))
    assert "no MLP of the form" in elementwise_warps.OPTIMIZATION.eligible(SimpleNamespace(model=nn.ReLU(), device=DEVICE))


# compiled_max_autotune


def test_compiled_mlps_keep_names_and_function():
    run, ran = run_of(), []

    def backend(graph, inputs):
        ran.append(len(inputs))
        return graph.forward

    before, mlp = outcome(run.model), run.model.model.layers[0].mlp
    compiled = CompiledMLP(copy.deepcopy(mlp), backend=backend, dynamic=False)
    assert list(compiled.state_dict()) == list(mlp.state_dict()) and not ran
    compiled.load_state_dict(mlp.state_dict())
    run.model.model.layers[0].mlp = compiled
    for one, other in zip(before, outcome(run.model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert len(ran) == 1


def test_a_micro_step_is_announced():
    step = announced(lambda run, batch, tokens: (run, batch, tokens))
    assert step("run", "batch", 7) == ("run", "batch", 7)


def test_compilation_has_its_reasons_in_words():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    compiled = compiled_max_autotune.OPTIMIZATION
    assert "needs a CUDA device" in registry.refusal(compiled, SimpleNamespace(model=nn.ReLU(), device=cpu))
    assert "this run is on cpu" in compiled.eligible(SimpleNamespace(model=run_of().model, device=cpu))
    assert "no MLP of the form" in compiled.eligible(SimpleNamespace(model=nn.ReLU(), device=cuda))
    model = run_of().model
    assert compiled.eligible(SimpleNamespace(model=model, device=cuda)) is None
    model.gradient_checkpointing_enable()
    assert "issues/154306" in compiled.eligible(SimpleNamespace(model=model, device=cuda))


# fused_swiglu_matmul


@pytest.mark.parametrize(("shape", "I"), [((1, 3), 2), ((2, 9, 16), 130), ((300, 40), 17), ((0, 8), 4)], ids=str)
def test_two_products_and_silu_in_one_kernel(shape, I):
    x, gate, up = drawn(*shape), drawn(I, shape[-1], seed=1), drawn(I, shape[-1], seed=2)
    y = fused_swiglu(x, gate, up)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    got = (y, *torch.autograd.grad(y, (x, gate, up), dy))
    sides = [side.detach().double().requires_grad_() for side in (x, gate, up)]
    truth = fused_swiglu_matmul.OPTIMIZATION.op.reference(*sides)
    for mine, right in zip(got, (truth, *torch.autograd.grad(truth, sides, dy.double())), strict=True):
        torch.testing.assert_close(
            mine.double(), right, rtol=1e-4, atol=1e-5 * max(1.0, right.abs().max().item() if right.numel() else 0)
        )


def test_swiglu_takes_any_strides_and_keeps_nothing_without_gradients():
    x, gate, up = drawn(12, 20).detach().t(), drawn(12, 30).detach()[:, ::2].t(), drawn(15, 12, seed=2).detach()
    want = nn.functional.silu(x @ gate.t()) * (x @ up.t())
    torch.testing.assert_close(fused_swiglu(x, gate, up), want, rtol=1e-4, atol=1e-5)
    assert [side.shape[0] for side in torch.ops.isoloss.fused_swiglu_matmul(x, gate, up, False)] == [20, 0, 0]


def test_swiglu_refuses_what_it_cannot_compute():
    x, weight = drawn(3, 8), drawn(4, 8)
    with pytest.raises(ValueError, match=r"\[3, 8\], \[4, 8\], \[4, 7\]"):
        fused_swiglu(x, weight, drawn(4, 7))
    with pytest.raises(ValueError, match="float64"):
        fused_swiglu(x.double(), weight.double(), weight.double())


def test_plain_mlps_are_fused_and_others_named():
    swiglu = fused_swiglu_matmul.OPTIMIZATION
    swapped_alike(swiglu, run_of(), SwigluMLP, 2)
    assert "layers.0.mlp.gate_proj is a peft" in swiglu.eligible(run_of(adapters=True))
    assert "has a bias" in swiglu.eligible(run_of(mlp_bias=True))
    hooked = run_of()
    hooked.model.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, given, made: made)
    assert "layers.1.mlp.up_proj has hooks" in swiglu.eligible(hooked)
    assert "no MLP of the form" in swiglu.eligible(SimpleNamespace(model=nn.ReLU(), device=DEVICE))


# triton_fp8_dot


@pytest.mark.parametrize("shape", [(1, 16, 1), (37, 51, 143), (150, 300, 130)], ids=str)
def test_fp8_is_its_emulation(shape):
    T, D, O = shape
    x, weight = drawn(T, D, scale=30.0), drawn(O, D, seed=1)
    (x_q, x_s), (w_q, w_s) = fp8.quantise(x.detach()), fp8.quantise(weight.detach())
    want = (x_q.double() @ w_q.double().t()) * x_s.double()[:, None] * w_s.double()
    y = fp8.fp8_linear(x, weight)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
    dy = torch.ones_like(y)
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    assert torch.equal(dx, dy @ weight) and torch.equal(dw, dy.t() @ x)


def test_rows_are_scaled_to_the_range_of_e4m3():
    x = torch.tensor([[1e-6, -2e-6], [0.0, 0.0], [3e8, 1e8]], device=DEVICE)
    q, scale = fp8.quantise(x)
    assert q.float().abs().amax(1).tolist() == [448.0, 0.0, 448.0]
    torch.testing.assert_close(q.float() * scale[:, None], x, rtol=2.0**-4, atol=0.0)
    assert torch.isnan(fp8.quantise(torch.tensor([[1.0, float("nan")]], device=DEVICE))[0].float()).any()


def test_fp8_is_approximate_in_its_output_alone():
    op = triton_fp8_dot.OPTIMIZATION.op
    for workload in [workload for workload in op.workloads if workload.small]:
        report = check_op(op, workload, DEVICE, 0, triton_fp8_dot.OPTIMIZATION.exactness)
        assert report.verdict.level is Level.APPROX
        assert {q.name for q in report.quantities if not q.within_limits} == {"output 0"}


def test_projections_are_swapped_but_not_the_head_nor_adapters():
    run = run_of(adapters=True)
    names = projections(run.model)
    assert len(names) == 14 and all(name.endswith(".base_layer") for name in names)
    swapped_alike(triton_fp8_dot.OPTIMIZATION, run, fp8.Fp8Linear, 14, atol=0.02)
    assert "besides its head" in triton_fp8_dot.OPTIMIZATION.eligible(run)
    assert "float64" in triton_fp8_dot.OPTIMIZATION.eligible(
        SimpleNamespace(model=run.model, device=DEVICE, dtype=torch.float64)
    )


def test_a_weight_that_changes_is_quantised_again():
    layer, x = fp8.Fp8Linear(nn.Linear(16, 8, device=DEVICE)), drawn(4, 16).detach()
    before = layer(x)
    first = layer.quantised[0]
    assert torch.equal(layer(x), before) and layer.quantised[0] is first
    with torch.no_grad():
        layer.weight.mul_(2.0)
    torch.testing.assert_close(layer(x) - layer.bias, 2 * (before - layer.bias))
    with pytest.raises(ValueError, match=r"\[4, 15\]"):
        fp8.fp8_linear(x[:, 1:], layer.weight)


# Custom ops


def test_the_custom_ops_are_well_behaved():
    x, weight = drawn(5, 8), drawn(6, 8, seed=1)
    ops = torch.ops.isoloss
    without_schema = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # which compares no fp8
    for operator, arguments, tests in (
        (ops.silu_mul_warps.default, (drawn(4, 6), drawn(4, 6, seed=1), 8), ("test_schema", *without_schema)),
        (ops.fused_swiglu_matmul.default, (x, weight, drawn(6, 8, seed=2), True), ("test_schema", *without_schema)),
        (ops.triton_fp8_linear.default, (x, weight, *fp8.quantise(weight.detach())), without_schema),
    ):
        found = torch.library.opcheck(operator, arguments, test_utils=tests)
        assert set(found.values()) == {"SUCCESS"}, operator
