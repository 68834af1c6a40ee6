"""MasterAdamW against AdamW written out in fp64, and what bf16 parameters must not lose."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from loop.config import OptimConfig
from loop.optim import MasterAdamW, copy_all, learning_rate

STEPS = 12
CONFIG = OptimConfig(lr=3e-3, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1, warmup_steps=3, clip_norm=1.0)
SHAPES = {"matrix": (7, 5), "conv": (4, 1, 3), "vector": (6,), "scalar": ()}


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def gradients(step: int) -> dict[str, torch.Tensor]:
    """Norms from far below the clipping limit to far above, in turn."""
    generator = torch.Generator().manual_seed(100 + step)
    scale = 10.0 ** (step % 4 - 2)
    return {name: torch.randn(shape, generator=generator) * scale for name, shape in SHAPES.items()}


def backward(params: dict[str, nn.Parameter], grads: dict[str, torch.Tensor]) -> None:
    """Gives the parameters these gradients through autograd, as a micro-step does."""
    sum((params[name] * grad.to(params[name])).sum() for name, grad in grads.items()).backward()


def schedule(config: OptimConfig, step: int, steps: int) -> float:
    """Linear to lr at step `warmup_steps` - 1, lr again at `warmup_steps`, then half a cosine down to the last step."""
    if step + 1 <= config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    angle = math.pi * (step - config.warmup_steps) / (steps - 1 - config.warmup_steps)
    low = config.min_lr_ratio * config.lr
    return low + (config.lr - low) * (1 + math.cos(angle)) / 2


class Fp64AdamW:
    """Decoupled weight decay (arXiv 1711.05101, algorithm 2) after clipping by the global norm, all in fp64."""

    def __init__(self, values: dict[str, torch.Tensor], config: OptimConfig) -> None:
        self.config = config
        self.w = {name: value.detach().double().clone() for name, value in values.items()}
        self.m = {name: torch.zeros_like(value) for name, value in self.w.items()}
        self.v = {name: torch.zeros_like(value) for name, value in self.w.items()}

    def step(self, grads: dict[str, torch.Tensor], step: int) -> float:
        c, t, lr = self.config, step + 1, schedule(self.config, step, STEPS)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
        shrink = min(1.0, c.clip_norm / norm) if c.clip_norm else 1.0
        for name, g in grads.items():
            g = g.double() * shrink
            self.m[name] = c.beta1 * self.m[name] + (1 - c.beta1) * g
            self.v[name] = c.beta2 * self.v[name] + (1 - c.beta2) * g * g
            m_hat, v_hat = self.m[name] / (1 - c.beta1**t), self.v[name] / (1 - c.beta2**t)
            decay = c.weight_decay if self.w[name].ndim >= 2 else 0.0
            self.w[name] = self.w[name] - lr * decay * self.w[name] - lr * m_hat / (v_hat.sqrt() + c.eps)
        return norm


@pytest.mark.parametrize("clip_norm", [1.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_are_those_of_adamw_in_fp64(dtype, clip_norm):
    config = dataclasses.replace(CONFIG, clip_norm=clip_norm)
    params = parameters(dtype)
    truth = Fp64AdamW(params, config)
    optimizer = MasterAdamW(params, config, STEPS)
    for step in range(STEPS):
        grads = {name: grad.to(dtype) for name, grad in gradients(step).items()}
        before = {name: master.detach().double().clone() for name, master in optimizer.masters.items()}
        old = {name: value.clone() for name, value in truth.w.items()}
        backward(params, grads)
        rate, norm = optimizer.step(step)
        assert float(norm) == pytest.approx(truth.step(grads, step), rel=1e-5)
        assert rate == pytest.approx(schedule(config, step, STEPS), rel=1e-12)
        for name, master in optimizer.masters.items():
            update, expected = master.detach().double() - before[name], truth.w[name] - old[name]
            rounding = 2.0**-23 * master.detach().double().norm()  # of the weight itself, which the update is added to
            assert float((update - expected).norm()) <= 1e-5 * float(expected.norm()) + float(rounding), name
    for name, master in optimizer.masters.items():
        error = (master.detach().double() - truth.w[name]).norm() / truth.w[name].norm()
        assert float(error) <= 1e-5, name
        assert master.dtype == torch.float32
        assert torch.equal(params[name].detach(), master.detach().to(dtype))


def test_the_schedule():
    config = OptimConfig(lr=2.0, warmup_steps=4, min_lr_ratio=0.1)
    rates = [learning_rate(config, step, 11) for step in range(11)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[7] == pytest.approx((2.0 + 0.2) / 2)  # half way down, at 4 + (10 - 4) / 2
    assert rates[10] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate(config, 50, 11) == pytest.approx(0.2)  # past the end, as after --steps was lowered
    assert learning_rate(dataclasses.replace(config, warmup_steps=0), 0, 1) == 2.0


def test_one_dimensional_tensors_are_not_decayed():
    params = parameters()
    before = {name: p.detach().clone() for name, p in params.items()}
    optimizer = MasterAdamW(params, dataclasses.replace(CONFIG, warmup_steps=0), STEPS)
    backward(params, {name: torch.zeros(shape) for name, shape in SHAPES.items()})
    optimizer.step(0)
    for name, parameter in params.items():
        factor = 1 - CONFIG.lr * CONFIG.weight_decay if parameter.ndim >= 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, rtol=1e-6, atol=0)
    assert torch.equal(params["vector"].detach(), before["vector"])


def test_gradients_of_bf16_parameters_add_up_in_fp32():
    """1 + 64 times 2**-9: in bf16 each small one is lost."""
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    optimizer = MasterAdamW({"p": parameter}, CONFIG, STEPS)
    small = torch.full((4,), 2.0**-9, dtype=torch.bfloat16)
    for grad in [torch.ones(4, dtype=torch.bfloat16), *[small] * 64]:
        (parameter * grad).sum().backward()
    total = optimizer.gradients()["p"]
    assert total.dtype == torch.float32 and total.tolist() == [1.125] * 4
    assert parameter.grad is None, "a second, bf16 sum would be kept beside it"
    naive = torch.ones(4, dtype=torch.bfloat16)
    for _ in range(64):
        naive = naive + small
    assert naive.tolist() == [1.0] * 4


@pytest.mark.parametrize("backwards", [1, 2, 3])
def test_deferred_gradients_wait_in_their_dtype_and_add_up_in_order(backwards):
    """Where one parameter gets several they are added as ever, but for what is left waiting: each is one's turn."""
    optimizers = []
    for _ in range(2):
        narrow, wide = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(3))
        optimizers.append(MasterAdamW({"narrow": narrow, "wide": wide}, CONFIG, STEPS))
    deferring, stock = optimizers
    grads = [
        torch.tensor(values, dtype=torch.bfloat16) for values in ([1, 2.0**25, 3], [2.0**-9, 1, -0.0], [5, -(2.0**25), 7])
    ]

    def backward_of(optimizer: MasterAdamW, grad: torch.Tensor) -> None:
        sum((parameter * grad).sum() for parameter in optimizer.parameters.values()).backward()

    for optimizer in optimizers:
        backward_of(optimizer, torch.full((3,), 2.0**-7, dtype=torch.bfloat16))
    with deferring.deferring() as waiting:
        for grad in grads[:backwards]:
            backward_of(deferring, grad)
            backward_of(stock, grad)
        master = deferring.masters["narrow"]
        assert deferring.parameters["narrow"].grad is None
        assert len(waiting) == backwards % 2, "in pairs they are added"
        if waiting:
            assert waiting[master].dtype == torch.bfloat16
            master.grad.add_(waiting.pop(master).float())
        assert deferring.masters["wide"].grad is deferring.parameters["wide"].grad, "its own master"
    for name, gradient in stock.gradients().items():
        assert torch.equal(deferring.gradients()[name], gradient), name
    backward_of(deferring, grads[0])
    backward_of(stock, grads[0])
    assert torch.equal(deferring.gradients()["narrow"], stock.gradients()["narrow"]), "afterwards at once"


def test_what_nobody_took_is_dropped():
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer = MasterAdamW({"p": parameter}, CONFIG, STEPS)
    with pytest.raises(ZeroDivisionError), optimizer.deferring() as waiting:
        (parameter * 2).sum().backward()
        assert waiting
        raise ZeroDivisionError
    assert waiting == {} and optimizer.gradients() == {"p": None} and parameter.grad is None
    (parameter * 2).sum().backward()
    assert optimizer.gradients()["p"].tolist() == [2.0, 2.0]


class DeliversItself(torch.autograd.Function):
    """x -> sum of parameter * x, whose backward adds to the parameter's sum and gives autograd no gradient for it."""

    @staticmethod
    def forward(ctx, parameter: nn.Parameter, x: torch.Tensor, optimizer: MasterAdamW) -> torch.Tensor:
        ctx.held = parameter, x, optimizer
        return (parameter * x).sum()

    @staticmethod
    def backward(ctx, dy: torch.Tensor) -> tuple[None, None, None]:
        parameter, x, optimizer = ctx.held
        collector, own = optimizer.collector(parameter), (dy * x).float()
        collector.grad = own if collector.grad is None else collector.grad.add_(own)
        return None, None, None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_delivered_to_the_collector_counts_once(dtype):
    """Alone, before and after one that autograd delivers, and through a step that clears it."""
    parameter = nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = MasterAdamW({"p": parameter}, CONFIG, STEPS)
    assert optimizer.collector(parameter) is optimizer.masters["p"]
    assert optimizer.collector(nn.Parameter(torch.ones(3))) is None
    own, autograd_s = torch.tensor([2.0, -1.0, 0.5], dtype=dtype), torch.tensor([0.25, 3.0, 1.0], dtype=dtype)
    DeliversItself.apply(parameter, own, optimizer).backward()
    assert optimizer.gradients()["p"].tolist() == own.tolist()
    (parameter * autograd_s).sum().backward()
    DeliversItself.apply(parameter, own, optimizer).backward()
    (DeliversItself.apply(parameter, own, optimizer) + (parameter * autograd_s).sum()).backward()  # in one backward
    assert optimizer.gradients()["p"].tolist() == (3 * own + 2 * autograd_s).tolist()
    _, norm = optimizer.step(0)
    assert float(norm) == pytest.approx(float((3 * own + 2 * autograd_s).float().norm()))
    assert optimizer.gradients() == {"p": None} and parameter.grad is None
    optimizer.release()
    assert optimizer.collector(parameter) is None


def test_updates_too_small_for_bf16_are_kept():
    config = OptimConfig(lr=1e-4, weight_decay=0.0, warmup_steps=0, min_lr_ratio=1.0)
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterAdamW({"p": parameter}, config, 100)
    seen = []
    for step in range(100):
        (parameter * 1.0).sum().backward()
        optimizer.step(step)
        seen.append(float(parameter.detach()[0]))
    assert seen[0] == 1.0, "one step is less than half of bf16's spacing below 1"
    assert float(optimizer.masters["p"][0]) == pytest.approx(0.99, abs=1e-5)
    assert seen[-1] == float(torch.tensor(0.99).bfloat16())


def test_a_step_clears_the_gradients():
    for dtype in (torch.float32, torch.bfloat16):
        params = parameters(dtype)
        optimizer = MasterAdamW(params, CONFIG, STEPS)
        backward(params, gradients(0))
        optimizer.step(0)
        assert set(optimizer.gradients().values()) == {None}
        assert all(p.grad is None for p in params.values())


def test_a_parameter_without_a_gradient_stays():
    params = parameters()
    before = params["matrix"].detach().clone()
    optimizer = MasterAdamW(params, CONFIG, STEPS)
    backward(params, {"vector": torch.ones(SHAPES["vector"])})
    _, norm = optimizer.step(0)
    assert float(norm) == pytest.approx(math.sqrt(6)) and torch.equal(params["matrix"].detach(), before)


def run(optimizer: MasterAdamW, params: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        backward(params, gradients(step))
        optimizer.step(step)


def copies(optimizer: MasterAdamW) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in optimizer.state().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_state_goes_on_with_the_same_bits(dtype):
    straight = parameters(dtype)
    whole = MasterAdamW(straight, CONFIG, STEPS)
    run(whole, straight, range(4))
    saved = copies(whole)
    run(whole, straight, range(4, 8))

    resumed = parameters(dtype)
    second = MasterAdamW(resumed, CONFIG, STEPS)
    second.load_state(saved)
    run(second, resumed, range(4, 8))
    assert whole.state().keys() == second.state().keys()
    assert all(torch.equal(value, second.state()[name]) for name, value in whole.state().items())
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_is_loaded_where_the_old_one_lies(dtype):
    """A captured CUDA graph goes on reading the addresses that it saw."""
    params = parameters(dtype)
    optimizer = MasterAdamW(params, CONFIG, STEPS)
    run(optimizer, params, range(3))
    saved = copies(optimizer)
    run(optimizer, params, range(3, 6))
    before = optimizer.state()
    addresses = {name: value.data_ptr() for name, value in before.items()}
    assert any(not torch.equal(saved[name], value) for name, value in before.items())
    optimizer.load_state(saved)
    after = optimizer.state()
    assert {name: value.data_ptr() for name, value in after.items()} == addresses
    assert len(after) == 4 * len(SHAPES) and all(torch.equal(saved[name], value) for name, value in after.items())
    saved["exp_avg.matrix"].fill_(7.0)
    assert not after["exp_avg.matrix"].eq(7.0).any(), "the state that was given must stay the caller's own"


def test_a_state_from_before_the_first_step_takes_the_moments_back_to_zero():
    params = parameters()
    optimizer = MasterAdamW(params, CONFIG, STEPS)
    start = copies(optimizer)
    run(optimizer, params, range(4))
    straight = copies(optimizer)
    addresses = {name: value.data_ptr() for name, value in optimizer.state().items()}
    optimizer.load_state(start)
    assert all(not value.any() for name, value in optimizer.state().items() if not name.startswith("master."))
    run(optimizer, params, range(4))
    again = optimizer.state()
    assert {name: value.data_ptr() for name, value in again.items()} == addresses
    assert straight.keys() == again.keys() and all(torch.equal(straight[name], value) for name, value in again.items())


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("name", ["master.conv", "step.matrix", "exp_avg_sq.vector"])
def test_a_state_with_a_gap_is_refused(name, fresh):
    params = parameters()
    optimizer = MasterAdamW(params, CONFIG, STEPS)
    run(optimizer, params, range(2))
    state = copies(optimizer)
    del state[name]
    target = MasterAdamW(parameters(), CONFIG, STEPS) if fresh else optimizer
    with pytest.raises(KeyError, match=name):
        target.load_state(state)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("name", ["master.matrix", "exp_avg.matrix", "step.vector"])
def test_a_tensor_of_another_shape_is_not_spread(name, fresh):
    params = parameters()
    optimizer = MasterAdamW(params, CONFIG, STEPS)
    run(optimizer, params, range(2))
    state = copies(optimizer)
    state[name] = torch.ones(1)
    target = MasterAdamW(parameters(), CONFIG, STEPS) if fresh else optimizer
    with pytest.raises(RuntimeError, match=rf"{name} has shape \[1\]"):
        target.load_state(state)


@pytest.fixture
def copied(monkeypatch) -> list[list[torch.Tensor]]:
    """The targets of every `_foreach_copy_`."""
    seen, function = [], torch._foreach_copy_

    def call(targets, sources) -> None:
        seen.append(list(targets))
        function(targets, sources)

    monkeypatch.setattr(torch, "_foreach_copy_", call)
    return seen


def test_only_pairs_of_equal_strides_and_dtypes_are_copied_together(copied):
    targets = [torch.zeros(3, 2, dtype=torch.bfloat16 if place == 5 else torch.float32) for place in range(6)]
    sources = [torch.arange(6.0).view(3, 2) + 10 * place for place in range(6)]
    sources[1] = sources[1].bfloat16()
    sources[2] = sources[2].t().contiguous().t()
    sources[4] = sources[4].bfloat16()
    copy_all(zip(targets, sources, strict=True))
    assert all(torch.equal(*pair) for pair in zip(targets, (source.float() for source in sources), strict=True))
    assert all(target.is_contiguous() for target in targets)
    assert [[next(i for i, t in enumerate(targets) if t is target) for target in one] for one in copied] == [
        [0, 3], [1, 4], [2], [5],
    ]  # fmt: skip
    copied.clear()
    copy_all([])
    assert copied == []


def test_publishing_rounds_as_copying_does_and_all_at_once(copied):
    """Halves between two bf16 numbers, subnormal, too large, infinite and NaN; an own master is copied nowhere."""
    values = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -(1 + 2.0**-9), 1e-40, 3.4e38, -0.0, math.inf, math.nan, 0.1])
    params = {name: nn.Parameter(torch.zeros(9, dtype=torch.bfloat16)) for name in "ab"}
    params["own"] = nn.Parameter(torch.ones(9))
    optimizer = MasterAdamW(params, CONFIG, STEPS)
    with torch.no_grad():
        for name in "ab":
            optimizer.masters[name].copy_(values)
    optimizer.publish()
    wanted = torch.zeros(9, dtype=torch.bfloat16).copy_(values)
    assert all(torch.equal(params[name].detach().view(torch.int16), wanted.view(torch.int16)) for name in "ab")
    assert [len(one) for one in copied] == [2]
