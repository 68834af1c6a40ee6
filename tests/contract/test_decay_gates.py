"""decay_gates: the function on awkward inputs, what it leaves out, and the swap on the models that it is for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from micro_steps import step
from torch import Tensor, nn

from abtest.opcheck import check_op
from abtest.oracle import worst_error
from abtest.quantity import same_bits
from kernels.contract import Workload
from loop.config import Config, DataConfig, LoraConfig
from loop.delta_net import DecayGates, PackedDeltaNet
from loop.run import Run
from loop.training import build
from negative_results.decay_gates import OPTIMIZATION
from negative_results.decay_gates.kernel import BLOCK, decay_gates
from negative_results.decay_gates.patch import FusedDecayGates, apply, eligible, gated_layers
from negative_results.decay_gates.reference import decay_gates_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def inputs_of(*shape: int, seed: int = 0) -> list[Tensor]:
    """a, b, A_log and dt_bias, all of which train."""
    case = Workload("case", {"T": 1, "H": shape[-1], "trained": 1}, "float32", small=True)
    _, _, A_log, dt_bias = OPTIMIZATION.op.inputs(case, DEVICE, seed)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    a, b = (scale * torch.randn(shape, generator=generator, device=DEVICE) for scale in (8.0, 4.0))
    return [a.requires_grad_(), b.requires_grad_(), A_log, dt_bias]


def textbook(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    return 1 / (1 + torch.exp(-b)), -torch.exp(A_log) * torch.log(1 + torch.exp(a + dt_bias))


def results(function, inputs: list[Tensor], incoming: list[Tensor]) -> list[Tensor]:
    """Both outputs and the gradients of what trains."""
    outputs = function(*inputs)
    trained = [value for value in inputs if value.requires_grad]
    incoming = [x.to(y.dtype) for x, y in zip(incoming, outputs, strict=True)]
    return [*outputs, *torch.autograd.grad(outputs, trained, incoming)]


def assert_near_truth(inputs: list[Tensor], seed: int = 7) -> None:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    incoming = [torch.randn(inputs[0].shape, generator=generator, device=DEVICE) for _ in range(2)]
    exact = results(textbook, [value.detach().double().requires_grad_(value.requires_grad) for value in inputs], incoming)
    for mine, truth in zip(results(decay_gates, inputs, incoming), exact, strict=True):
        # sums over positions of both signs lose as much as their largest terms are off by
        torch.testing.assert_close(mine, truth.to(mine.dtype), rtol=1e-5, atol=1e-6 * (1 + truth.abs().max().item()))


@pytest.mark.parametrize(
    "shape", [(1,), (3,), (1, 1, 16), (5, 7), (2, 3, 11), (1, 97, 32), (BLOCK // 16 + 1, 16), (1, 4099, 17)], ids=str
)
def test_shapes_that_no_block_divides(shape):
    assert_near_truth(inputs_of(*shape))


def test_any_strides_in_and_contiguous_out():
    """a and b as slices of one product, which is what narrow projections that share an input are."""
    both = torch.randn(1, 53, 11, device=DEVICE)
    a, b = (part.requires_grad_() for part in both.detach().split([4, 7], dim=-1))
    b = b[..., 1:5]
    _, _, A_log, dt_bias = inputs_of(1, 4)
    assert not a.is_contiguous() and not b.is_contiguous()
    assert all(y.is_contiguous() for y in decay_gates(a, b, A_log, dt_bias))
    assert_near_truth([a, b.detach().requires_grad_(), A_log, dt_bias])
    every = torch.randn(8, device=DEVICE)[::2].detach()
    assert_near_truth([a, b.detach().requires_grad_(), every.clone().requires_grad_(), every.requires_grad_()])


@pytest.mark.filterwarnings("ignore:overflow encountered")  # NumPy's word on it, in the interpreter
def test_flat_ends_and_the_threshold_of_the_softplus():
    """Decays underflow to 0 and grow without bound; nothing becomes NaN, and above 20 softplus is its argument."""
    points = [-1e30, -200.0, -104.0, -88.0, -20.0, -1e-30, 0.0, 19.999, 20.0, 20.001, 88.0, 1e4, 1e30]
    a = torch.tensor(points, device=DEVICE)[:, None].requires_grad_()
    b = a.detach().clone().requires_grad_()
    A_log, dt_bias = torch.tensor([0.7], device=DEVICE), torch.zeros(1, device=DEVICE)
    incoming = [torch.ones_like(a), torch.ones_like(a)]
    ours, theirs = (results(function, [a, b, A_log, dt_bias], incoming) for function in (decay_gates, decay_gates_reference))
    for mine, their in zip(ours, theirs, strict=True):
        assert torch.isfinite(mine).all()
        torch.testing.assert_close(mine, their, rtol=2e-6, atol=1e-37)  # what is below fp32's normal range may be 0
    decay = float(torch.tensor(0.7).exp())
    assert ours[1][-4:, 0].tolist() == pytest.approx([-decay * point for point in points[-4:]], rel=1e-6)
    assert ours[2][-4:, 0].tolist() == pytest.approx([-decay] * 4, rel=1e-6)


def test_one_of_the_outputs_may_go_unused():
    inputs = inputs_of(1, 9, 4)
    for index in (0, 1):
        mine, exact = (torch.autograd.grad(function(*inputs)[index].sum(), inputs, allow_unused=True, materialize_grads=True)
                       for function in (decay_gates, decay_gates_reference))  # fmt: skip
        for ours, theirs in zip(mine, exact, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trained", [(0, 1), (0, 1, 2), (0, 1, 3), (2, 3), (1,)], ids=str)
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(trained):
    inputs = inputs_of(1, 33, 5)
    incoming = [torch.randn_like(inputs[0]) for _ in range(2)]
    everything = results(decay_gates, inputs, incoming)
    some = [value.detach().requires_grad_(index in trained) for index, value in enumerate(inputs)]
    assert all(map(same_bits, results(decay_gates, some, incoming)[2:], (everything[2 + index] for index in trained)))


def test_results_have_the_same_bits_every_time_and_rows_do_not_depend_on_others():
    inputs, part = inputs_of(1, 301, 16), slice(131, 164)
    incoming = [torch.randn_like(inputs[0]) for _ in range(2)]
    first, second = (results(decay_gates, inputs, incoming) for _ in range(2))
    assert all(map(same_bits, first, second))
    few = [*(value.detach()[:, part].clone().requires_grad_() for value in inputs[:2]), *inputs[2:]]
    alone = results(decay_gates, few, [value[:, part] for value in incoming])
    assert all(same_bits(whole[:, part], own) for whole, own in zip(first[:4], alone[:4], strict=True))


@pytest.mark.parametrize("shape", [(4, 24), (1, 3, 7), (0, 8), (1, 0, 8)], ids=str)
def test_the_custom_ops_are_well_behaved(shape):
    inputs = inputs_of(*shape)
    plain, g = [value.detach() for value in inputs], torch.randn(shape, device=DEVICE)
    for operator, arguments in (
        (torch.ops.isoloss.decay_gates.default, tuple(inputs)),
        (torch.ops.isoloss.decay_gates_backward.default, (g, g, *plain, True)),
        (torch.ops.isoloss.decay_gates_backward.default, (g, g, *plain, False)),
    ):
        outcome = torch.library.opcheck(operator, arguments)
        assert set(outcome.values()) == {"SUCCESS"}, outcome


def test_no_rows_still_give_a_gradient():
    inputs = inputs_of(1, 0, 8)
    sum(y.sum() for y in decay_gates(*inputs)).backward()
    assert inputs[0].grad.shape == (1, 0, 8) and torch.equal(inputs[2].grad, torch.zeros(8, device=DEVICE))


def test_a_wide_parameter_beside_narrow_activations():
    """A run may keep A_log in fp32 while it computes in bf16; each gradient has its own dtype."""
    a, b, A_log, dt_bias = inputs_of(1, 40, 4)
    a, b = (value.detach().bfloat16().requires_grad_() for value in (a, b))
    beta, g = decay_gates(a, b, A_log, dt_bias)
    assert (beta.dtype, g.dtype) == (torch.bfloat16, torch.float32)
    (beta.float().sum() + g.sum()).backward()
    assert (a.grad.dtype, A_log.grad.dtype) == (torch.bfloat16, torch.float32)
    want = decay_gates_reference(a.detach(), b.detach(), A_log.detach(), dt_bias.detach())
    torch.testing.assert_close(g, want[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(beta, want[0], rtol=1 / 128, atol=0)  # Triton's interpreter cuts bf16 off


def test_refuses_what_it_cannot_compute():
    a, b, A_log, dt_bias = (value.detach() for value in inputs_of(2, 3))
    for wrong in ((a, b[:1], A_log, dt_bias), (a, b.bfloat16(), A_log, dt_bias), (a, b, A_log[:2], dt_bias),
                  (a, b, A_log, dt_bias[None]), (a, b, A_log[:2], dt_bias[:2])):  # fmt: skip
        with pytest.raises(ValueError, match=r"a and b \[\.\.\., H\] of one dtype"):
            decay_gates(*wrong)
    with pytest.raises(ValueError, match="float64"):
        decay_gates(a.double(), b.double(), A_log, dt_bias)


def test_traces_without_a_graph_break():
    inputs = inputs_of(1, 6, 4)

    def function(a: Tensor, *rest: Tensor) -> Tensor:
        beta, g = decay_gates(a + 1, *rest)
        return (beta * g).square()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    theirs = torch.autograd.grad(function(*inputs).sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs).sum(), inputs), theirs)


@pytest.mark.parametrize("workload", [w for w in OPTIMIZATION.op.workloads if w.small], ids=lambda w: w.name)
@pytest.mark.parametrize("seed", range(1, 5))
def test_other_draws_pass_the_op_check(workload, seed):
    report = check_op(OPTIMIZATION.op, workload, DEVICE, seed)
    assert report.passed, report.verdict.reason


def built(model: str, method: str = "full", checkpointing: bool = False) -> tuple[Run, object]:
    where = {"device": DEVICE.type, "dtype": "float32", "gradient_checkpointing": checkpointing}
    settings = {"repeatable_attention": True, "lora": LoraConfig(rank=4, alpha=8.0), "data": DataConfig(pack_length=96)}
    run, dataset = build(Config(model=model, method=method, **where, **settings))
    return run, dataset.micro_batches(0, 1, 1)[0].to(run.device)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_qwen35_trains_as_before(method, checkpointing):
    run, batch = built("qwen3.5-tiny", method, checkpointing)
    names, before = gated_layers(run.model), dict(run.model.named_parameters())
    assert names == [f"model.layers.{index}.linear_attn" for index in range(3)]
    state, stock = list(run.model.state_dict()), step(run, batch)
    assert OPTIMIZATION.eligible(run) is None
    OPTIMIZATION.apply(run)
    after = dict(run.model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert list(run.model.state_dict()) == state
    assert all(isinstance(run.model.get_submodule(name).gates, FusedDecayGates) for name in names)
    changed = step(run, batch)
    assert changed.keys() == stock.keys() and len(stock) > 10
    error, where = worst_error(changed, stock)
    assert 0 < error <= 1e-4, where
    assert "has no gated-delta layers with gates of the loop's own" in eligible(run)
    with pytest.raises(ValueError, match="has no gated-delta layer whose gates"):
        apply(run)


class Other(PackedDeltaNet):
    """As `ssm_fast_path` and others swap layers: made of the one that is there."""


@pytest.mark.parametrize("first", [True, False])
def test_it_goes_with_another_delta_rule_in_either_order(first):
    model = nn.Sequential(PackedDeltaNet(nn.Module()))
    run = SimpleNamespace(model=model)
    if first:
        apply(run)
    model[0] = Other(model[0])
    if not first:
        apply(run)
    assert type(model[0]) is Other and type(model[0].gates) is FusedDecayGates


def test_a_run_without_delta_layers_and_one_with_hooks_are_refused():
    dense, _ = built("qwen3-tiny")
    assert "has no gated-delta layers" in eligible(dense)
    run, _ = built("qwen3.5-tiny")
    layer = run.model.get_submodule(gated_layers(run.model)[1])
    handle = layer.gates.register_forward_hook(lambda *arguments: None)
    assert eligible(run) == "model.layers.1.linear_attn.gates carries hooks or a forward of its own, which a swap would lose"
    handle.remove()
    layer.A_log.data = layer.A_log.data.double()
    assert "model.layers.1.linear_attn.A_log is torch.float64" in eligible(run)


def test_a_layer_of_another_kind_keeps_its_gates():
    """Whoever changed what a layer's gates compute is not overruled."""

    class Steeper(DecayGates):
        def forward(self, a, b, A_log, dt_bias):
            beta, g = super().forward(a, b, A_log, dt_bias)
            return beta, 2 * g

    run, _ = built("qwen3.5-tiny")
    names = gated_layers(run.model)
    run.model.get_submodule(names[0]).gates = Steeper()
    assert gated_layers(run.model) == names[1:]
