"""fused_adamw: every element against fp64 and the loop's optimizer, and whatever else holds on to that optimizer."""

from __future__ import annotations

import dataclasses
import gc
import math
from types import SimpleNamespace

import pytest
import torch
from graphed import CONFIG as RUN
from graphed import made, pack
from torch import Tensor, nn

from abtest.catalogue import cases, catalogue
from abtest.update import check_update, update_config
from kernels.cuda_graphs.micro_step import CAPTURES, REPLAYS, GraphedMicroStep
from kernels.fused_adamw import kernel
from kernels.fused_adamw.kernel import Moved, Settings, update
from kernels.fused_adamw.optimizer import FusedMasterAdamW
from kernels.fused_adamw.patch import apply, eligible
from kernels.registry import discover
from loop.config import Config, OptimConfig
from loop.optim import MasterAdamW
from loop.training import switch_on, train

U = 2.0**-24  # fp32's unit roundoff
STEPS = 12
CONFIG = OptimConfig(lr=3e-3, beta2=0.999, weight_decay=0.1, warmup_steps=3, clip_norm=1.0)
SHAPES = {"matrix": (7, 5), "wide": (16, 33), "conv": (4, 1, 3), "vector": (6,), "scalar": (), "none": (0, 4)}


def normal(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def optimizer_of(fused: bool, dtype: torch.dtype = torch.float32, config: OptimConfig = CONFIG):
    params = {name: nn.Parameter(normal(shape, place).to(dtype)) for place, (name, shape) in enumerate(SHAPES.items())}
    run = SimpleNamespace(optimizer=MasterAdamW(params, config, STEPS))
    if fused:
        assert eligible(run) is None
        apply(run)
        assert isinstance(run.optimizer, FusedMasterAdamW)
    return run.optimizer


def gradients(step: int, *without: str) -> dict[str, Tensor]:
    """Norms from far below the clipping limit to far above, in turn."""
    names = enumerate(name for name in SHAPES if name not in without)
    return {name: normal(SHAPES[name], 100 * step + place, 10.0 ** (step % 4 - 2)) for place, name in names}


def deliver(optimizer, given: dict[str, Tensor]) -> None:
    sum((optimizer.parameters[name] * own.to(optimizer.parameters[name])).sum() for name, own in given.items()).backward()


def copies(optimizer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in optimizer.state().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# The kernel


def truth(before: Moved, clip: float, settings: Settings) -> dict[str, tuple[Tensor, Tensor]]:
    """What every element becomes in fp64, and how far rounding may take it: README.md has the algebra."""
    weight, gradient, mean, square = (tensor.double() for tensor in before[:4])
    gradient = (before.gradient * clip).double()
    size = settings.beta1 * mean.abs() + (1 - settings.beta1) * gradient.abs()
    mean = settings.beta1 * mean + (1 - settings.beta1) * gradient
    square = settings.beta2 * square + (1 - settings.beta2) * gradient.square()
    step = settings.rate / (1 - settings.beta1**before.count)
    denominator = square.sqrt() / math.sqrt(1 - settings.beta2**before.count) + settings.eps
    return {
        "mean": (mean, 3 * U * size),
        "square": (square, 4 * U * square),
        "master": (
            (1 - settings.decay) * weight - step * mean / denominator,
            U * (12 * step * size / denominator + 3 * weight.abs()),
        ),
    }


@pytest.mark.parametrize("settings", [
    Settings(1e-3, 1e-5, 0.9, 0.999, 1e-8), Settings(0.2, 0.1, 0.0, 0.0, 1e-3), Settings(0.1, 0.0, 0.5, 0.95, 0.0),
], ids=str)  # fmt: skip
def test_every_element_is_as_near_to_fp64_as_rounding_allows(settings, monkeypatch):
    """Sizes of one element, of no whole block, of several programs; on addresses that allow wide loads, and on others."""
    monkeypatch.setattr(kernel, "BLOCK_INTERPRETED", 64)
    launches, launch = [], kernel._launch
    monkeypatch.setattr(kernel, "_launch", lambda *given: (launches.append((len(given[0]), given[-1])), launch(*given)))

    def drawn(size: int, seed: int, shift: int) -> Tensor:
        return normal((size + shift,), seed)[shift:].clone() if not shift else normal((size + shift,), seed)[shift:]

    moved = []
    for place, (size, shift) in enumerate([(1, 0), (37, 0), (64, 0), (2 * 64 * kernel.BLOCKS + 16, 0), (1100, 0), (64, 1)]):
        master, gradient, mean, square = (drawn(size, 10 * place + part, shift) for part in range(4))
        moved.append(Moved(master, gradient, 0.1 * mean, 0.01 * square.square(), float(place + 1)))
    clip = torch.tensor(0.3)
    before = [Moved(*(tensor.clone() for tensor in one[:4]), one.count) for one in moved]
    versions = [one.master._version for one in moved]
    update(moved, clip, settings)
    for one, old, version in zip(moved, before, versions, strict=True):
        assert torch.equal(one.gradient, old.gradient) and one.master._version > version
        for name, (wanted, bound) in truth(old, float(clip), settings).items():
            error = (getattr(one, name).double() - wanted).abs()
            assert (error <= bound * 1.001).all(), (name, one.master.numel(), float((error / bound).max()))
    assert launches == [(2, True), (4, False)]


# The optimizer beside the loop's


@pytest.mark.parametrize("clip_norm", [1.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_differs_from_the_loop_s_by_rounding_alone(dtype, clip_norm):
    """From the loop's state at each step; some parameters get no gradient in some steps, so that counts differ."""
    config = dataclasses.replace(CONFIG, clip_norm=clip_norm)
    stock, fused = optimizer_of(False, dtype, config), optimizer_of(True, dtype, config)
    for step in range(STEPS):
        given = gradients(step, *((), ("vector",), ("matrix", "scalar"))[step % 3])
        before = copies(stock)
        fused.load_state(before)
        for optimizer in (stock, fused):
            deliver(optimizer, given)
        rates, norms = zip(*(optimizer.step(step) for optimizer in (stock, fused)), strict=True)
        assert rates[0] == rates[1] and torch.equal(*norms)
        assert stock.state().keys() == fused.state().keys()
        for name, master in stock.masters.items():
            mine, old = fused.masters[name].detach(), before[f"master.{name}"]
            moved, apart = (master.detach() - old).abs(), (mine - master.detach()).abs()
            if name not in given:
                assert torch.equal(mine, old), name
            assert (apart <= 40 * U * (rates[0] * 4 + moved) + 6 * U * old.abs()).all(), name
            assert fused.state()[f"step.{name}"] == stock.state()[f"step.{name}"]
            assert torch.equal(fused.parameters[name].detach(), mine.to(dtype))
        assert set(fused.gradients().values()) == {None}


def test_a_step_without_any_gradient_changes_nothing():
    fused = optimizer_of(True)
    before = copies(fused)
    assert float(fused.step(0)[1]) == 0.0 and same(before, copies(fused))


@pytest.mark.parametrize("clip_norm", [1.0, 0.0])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_does_as_in_the_loop(bad, clip_norm):
    config = dataclasses.replace(CONFIG, clip_norm=clip_norm)
    stock, fused = optimizer_of(False, config=config), optimizer_of(True, config=config)
    given = gradients(0)
    given["matrix"][2, 3] = bad
    for optimizer in (stock, fused):
        deliver(optimizer, given)
    norms = [optimizer.step(0)[1] for optimizer in (stock, fused)]
    assert torch.equal(norms[0].view(torch.int32), norms[1].view(torch.int32)) and not norms[0].isfinite()
    for name, value in stock.state().items():
        assert torch.equal(value.isnan(), fused.state()[name].isnan()), name
        torch.testing.assert_close(fused.state()[name], value, rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("laid_out", [(1, 12, 4), (3, 1, 1)], ids=str)
def test_a_gradient_with_other_strides_is_read_where_it_belongs(laid_out):
    stock, fused = optimizer_of(False), optimizer_of(True)
    own = normal((12,), 5).as_strided(SHAPES["conv"], laid_out)
    for optimizer in (stock, fused):
        optimizer.masters["conv"].grad = own.clone(memory_format=torch.preserve_format)
        optimizer.step(0)
    torch.testing.assert_close(fused.masters["conv"], stock.masters["conv"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("method", "dtype"), [("lora", "bfloat16"), ("full", "float32")])
def test_the_update_passes_the_gate_s_oracle(method, dtype):
    run, _ = made("qwen3.5-tiny", False, method=method, dtype=dtype, steps=30, optim=update_config(Config()).optim)
    switch_on(run, ["fused_adamw"])
    assert run.refused == {}
    report = check_update(run, 0)
    assert report.passed and 0 < report.error < 2e-6, report


# States and checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
def test_a_state_goes_from_either_to_either(before, after, dtype):
    """With the bits of the optimizer that goes on, from moments in place; a state from before the first step resets them."""
    first, straight, second = optimizer_of(before, dtype), optimizer_of(after, dtype), optimizer_of(after, dtype)
    start = copies(second)
    for step in range(3):
        deliver(first, gradients(step))
        first.step(step)
    straight.load_state(copies(first))
    deliver(second, gradients(7))
    second.step(7)
    addresses = {name: value.data_ptr() for name, value in second.state().items()}
    second.load_state(copies(first))
    assert same(copies(second), copies(first))
    for optimizer in (straight, second):
        deliver(optimizer, gradients(3))
        optimizer.step(3)
    assert same(copies(second), copies(straight))
    assert {name: value.data_ptr() for name, value in second.state().items()} == addresses
    second.load_state(start)
    assert all(not value.any() for name, value in second.state().items() if not name.startswith("master."))


@pytest.mark.parametrize("earlier", [["fused_adamw"], []], ids=str)
def test_a_run_is_resumed_with_the_same_bits(earlier, tmp_path):
    """Also one that began without: from there on it is a run whose optimizer was given that state."""
    config = dataclasses.replace(RUN, model="qwen3-tiny", dtype="bfloat16", grad_accum=1, steps=2, save_every=1)
    config = dataclasses.replace(config, output=tmp_path)
    first = train(config, earlier)
    later = train(dataclasses.replace(config, steps=4, resume=True), ["fused_adamw"])
    assert later.enabled == ("fused_adamw",) and len(later.steps) == 2
    straight = train(dataclasses.replace(config, steps=4, output=None), ["fused_adamw"])
    if earlier:  # the rates of the warm-up don't depend on the number of steps
        assert first.losses + later.losses == straight.losses
    assert later.losses == pytest.approx(straight.losses[2:], rel=1e-3)


def test_a_released_optimizer_takes_no_gradients():
    fused = optimizer_of(True, torch.bfloat16)
    parameter = fused.parameters["matrix"]
    assert fused.collector(parameter) is fused.masters["matrix"]
    fused.release()
    deliver(fused, {"matrix": torch.ones(SHAPES["matrix"])})
    assert fused.gradients()["matrix"] is None and parameter.grad is not None
    assert fused.collector(parameter) is None


# Together with others


@pytest.mark.usefixtures("taped")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_go_on_after_a_step(dtype):
    """A replay has the weights of the step before, and the step the gradients of the replays."""
    run, plain = (made(graphed=graphed, dtype=dtype)[0] for graphed in (True, False))
    for own in (run, plain):
        graphed, own.micro_step = own.micro_step, plain.micro_step
        switch_on(own, ["fused_adamw"])
        own.micro_step = graphed
    assert isinstance(run.micro_step, GraphedMicroStep)
    for step in range(3):
        for own in (run, plain):
            for seed in (step, 7):
                own.micro_step(own, pack(own, seed), 50)
        buffers = {name: gradient.data_ptr() for name, gradient in run.optimizer.gradients().items()}
        known = run.micro_step.gradients.buffers
        assert buffers == {name: known[run.optimizer.masters[name]].data_ptr() for name in buffers}
        assert torch.equal(*(own.optimizer.step(step)[1] for own in (run, plain)))
        assert same(copies(run.optimizer), copies(plain.optimizer))
    assert run.micro_step.counts == {REPLAYS: 6, CAPTURES: 2}


@pytest.mark.parametrize(
    "names", [["full_ft_linear", "fused_adamw"], ["full_ft_linear", "fused_adamw", "linear_cross_entropy"]], ids="+".join
)
@pytest.mark.parametrize("turned", [False, True], ids=["in order", "the other way round"])
def test_who_adds_to_the_masters_gradients_still_does(names, turned):
    names = names[::-1] if turned else names
    run, _ = made(graphed=False, method="full", dtype="bfloat16")
    for name in names:  # not `switch_on`, which has an order of its own
        assert discover()[name].eligible(run) is None
        discover()[name].apply(run)
    gc.collect()
    owners = [m.main for m in run.model.modules() if hasattr(m, "main")] + [getattr(run.loss_head, "main", None)]
    assert len(owners) > 3 and all(main.optimizer() is not None for main in owners if main is not None)
    assert all(main.collector(p) is not None for main in owners if main for p in run.optimizer.parameters.values())
    run.micro_step(run, pack(run, 1), 50)
    before = copies(run.optimizer)
    assert all(gradient is not None for gradient in run.optimizer.gradients().values())
    run.optimizer.step(0)
    assert all(not torch.equal(before[f"master.{name}"], master) for name, master in run.optimizer.masters.items())


@pytest.mark.parametrize("name", ["decay_dropped", "decay_coupled", "beta2_off", "masters_rounded", "rate_frozen"])
def test_a_defect_of_the_update_is_planted_on_it_as_on_the_loop_s(name):
    """Else the gate could not show that it catches one where this is on."""
    found = []
    for planted in (False, True):
        run, _ = made("qwen3-shallow-tiny", False, steps=8)
        switch_on(run, ["fused_adamw"])
        if planted:
            cases(catalogue()[name])[0].apply(run)
        assert isinstance(run.optimizer, FusedMasterAdamW) and (type(run.optimizer) is not FusedMasterAdamW) is planted
        for step in range(3):
            run.micro_step(run, pack(run, step), 50)
            run.optimizer.step(step)
        found.append(copies(run.optimizer))
    assert found[0].keys() == found[1].keys() and not same(*found)


def test_refuses_with_the_reason():
    run = SimpleNamespace(optimizer=optimizer_of(True))
    assert eligible(run) == "FusedMasterAdamW is not the loop's AdamW"
    sparse = nn.Parameter(torch.zeros(4, 6)[:, ::2])
    run.optimizer = MasterAdamW({"sparse": sparse}, CONFIG, 1)
    assert eligible(run) == "sparse does not lie densely in memory: its strides are [6, 2]"
    run.optimizer = MasterAdamW({"turned": nn.Parameter(torch.zeros(4, 6).t())}, CONFIG, 1)
    assert eligible(run) is None
