"""How bf16 gradients get into the buffers of cuda_graphs: all together once backward has ended, with the loop's bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from graphed import made, outcome, pack, same
from torch import nn

from kernels.cuda_graphs import gradients as gradients_module
from kernels.cuda_graphs.gradients import Accumulators, deferred
from kernels.cuda_graphs.micro_step import CAPTURES, REPLAYS
from loop.config import OptimConfig
from loop.optim import MasterAdamW
from loop.training import switch_on

SEQUENCES = [(1,), (2,), (3, 4, 5), (1,), (5, 4)]
SHAPES = {"wide": (4, 3), "narrow": (5, 2), "conv": (4, 1, 3), "vector": (6,), "delivered": (3, 2), "absent": (2, 2)}
Launches = list[list[tuple[torch.Tensor, torch.Tensor]]]


@pytest.fixture
def launches(monkeypatch) -> dict[str, Launches]:
    """The pairs of every `_foreach_copy_` and `_foreach_add_`."""
    seen: dict[str, Launches] = {"_foreach_copy_": [], "_foreach_add_": []}

    def watched(name: str, function: Callable[..., None]) -> Callable[..., None]:
        def call(targets, sources) -> None:
            seen[name].append(list(zip(targets, sources, strict=True)))
            function(targets, sources)

        return call

    for name in seen:
        monkeypatch.setattr(torch, name, watched(name, getattr(torch, name)))
    return seen


# Whole runs


@pytest.mark.usefixtures("taped")
@pytest.mark.parametrize(
    ("method", "on"), [("lora", ()), ("lora", ("lora_matmul",)), ("full", ()), ("full", ("full_ft_linear",))], ids=str
)
def test_bf16_gradients_have_the_bits_of_the_loop(method, on):
    """With full_ft_linear most go to the collector; those of norms and convolutions wait beside them."""
    run, plain = (
        made("qwen3.5-shallow-tiny", graphed=graphed, method=method, dtype="bfloat16")[0] for graphed in (True, False)
    )
    graphed, run.micro_step = run.micro_step, plain.micro_step
    for own in (run, plain):
        switch_on(own, on)
        assert own.refused == {}
    run.micro_step = graphed
    for seeds in SEQUENCES:
        assert same(*(outcome(own, *(pack(own, seed) for seed in seeds)) for own in (run, plain))), seeds
    assert run.micro_step.counts == {REPLAYS: 8, CAPTURES: 2}
    assert all(parameter.grad is None for parameter in run.model.parameters())


@pytest.mark.usefixtures("taped")
def test_steps_between_have_the_weights_of_the_loop():
    run, plain = (made(graphed=graphed, dtype="bfloat16")[0] for graphed in (True, False))
    for step in range(3):
        for own in (run, plain):
            for seed in (step, 7):
                own.micro_step(own, pack(own, seed), 50)
        norms = [own.optimizer.step(step)[1] for own in (run, plain)]
        assert torch.equal(*norms)
        for mine, theirs in zip(run.optimizer.state().values(), plain.optimizer.state().values(), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.usefixtures("taped")
def test_a_graph_casts_all_gradients_together():
    run, _ = made("qwen3.5-shallow-tiny", dtype="bfloat16")
    count = len(run.optimizer.masters)
    outcome(run, pack(run, 1), pack(run, 2))
    counted = {}
    for (*_, held), captured in run.micro_step.graphs.items():
        tape = captured.seam.backward.tape
        counted[any(held)] = Counter(function._schema.name for function, *_ in tape)
        written = [arguments[0] for function, arguments, *_ in tape if "foreach" in function._schema.name]
        assert {len(targets) for targets in written} == {count}
    first, later = counted[False], counted[True]
    assert (first["aten::_foreach_copy_"], first["aten::_foreach_add_"]) == (1, 0)
    assert (later["aten::_foreach_copy_"], later["aten::_foreach_add_"]) == (1, 1)
    assert later["aten::_to_copy"] == first["aten::_to_copy"] and later["aten::add_"] == first["aten::add_"]


class OwnWay:
    """An optimizer that another optimization put there: it has masters, and says nothing of leaving gradients to others."""

    def __init__(self, inner: MasterAdamW) -> None:
        self.masters, self.parameters, self.gradients, self.zero_grad = (
            inner.masters, inner.parameters, inner.gradients, inner.zero_grad,
        )  # fmt: skip
        self.inner = inner


@pytest.mark.usefixtures("taped")
def test_an_optimizer_that_leaves_nothing_adds_as_ever(launches):
    run, plain = (made(graphed=graphed, dtype="bfloat16")[0] for graphed in (True, False))
    outcome(run, pack(run, 1))
    run.optimizer = OwnWay(run.optimizer)
    for seeds in SEQUENCES:
        launches["_foreach_add_"].clear()
        assert same(*(outcome(own, *(pack(own, seed) for seed in seeds)) for own in (run, plain))), seeds
        assert launches["_foreach_add_"] == []
    assert run.micro_step.counts == {REPLAYS: 9, CAPTURES: 3}


@pytest.mark.usefixtures("taped")
def test_a_capture_that_fails_leaves_no_gradient_behind():
    run, plain = (made(graphed=graphed, dtype="bfloat16", method="full")[0] for graphed in (True, False))
    head, calls = run.loss_head, []

    def waits_in_the_capture(model, hidden, batch):
        calls.append(0)
        loss = head(model, hidden, batch)
        if len(calls) == 3:  # after two warm-ups
            loss.register_hook(lambda gradient: gradient * float(gradient))
        return loss

    run.loss_head = waits_in_the_capture
    assert same(outcome(run, pack(run, 1), pack(run, 2)), outcome(plain, pack(run, 1), pack(run, 2)))
    assert run.micro_step.counts[CAPTURES] == 1  # of the second; the first ran plainly
    waiting = run.optimizer.waiting
    assert not waiting.wanted and not waiting.gradients and all(p.grad is None for p in run.model.parameters())


@pytest.mark.usefixtures("taped")
def test_a_backward_that_cannot_be_captured_leaves_no_gradient_behind():
    """The second of two graphs, after the first was recorded."""
    run, plain = (made(graphed=graphed, dtype="bfloat16")[0] for graphed in (True, False))
    calls = []

    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            calls.append(0)
            return gradient * (1 if len(calls) != 3 else float(gradient.sum() != gradient.sum()))  # after two warm-ups

    norm = run.model.model.norm
    own = norm.forward
    norm.forward = lambda x: Waits.apply(own(x))
    assert same(outcome(run, pack(run, 1), pack(run, 2)), outcome(plain, pack(run, 1), pack(run, 2)))
    assert run.micro_step.counts[CAPTURES] == 1 and len(calls) > 3  # of the second; the first ran plainly
    waiting = run.optimizer.waiting
    assert not waiting.wanted and not waiting.gradients and all(p.grad is None for p in run.model.parameters())


@pytest.mark.usefixtures("taped")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_the_head_trains_comes_before_the_second_graph(dtype):
    """A frozen head behind something that trains, whose gradients are there when the second graph begins."""
    runs = [made(graphed=graphed, dtype=dtype)[0] for graphed in (True, False)]
    for run in runs:
        extra = nn.Parameter(torch.full((run.model.config.hidden_size,), 1.5).to(run.dtype))
        head, before = run.loss_head, run.optimizer
        run.loss_head = lambda model, hidden, batch, head=head, extra=extra: head(model, hidden * extra, batch)
        run.optimizer = MasterAdamW(before.parameters | {"extra": extra}, OptimConfig(), 4)
        before.release()
    for seeds in SEQUENCES:
        assert same(*(outcome(run, *(pack(run, seed) for seed in seeds)) for run in runs)), seeds
    assert runs[0].micro_step.counts == {REPLAYS: 8, CAPTURES: 2}


# By hand, with all kinds of tensors


def optimizer_of_all_kinds() -> MasterAdamW:
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return MasterAdamW(
        {name: nn.Parameter(value if name == "wide" else value.bfloat16()) for name, value in values.items()},
        OptimConfig(),
        4,
    )


def micro_step(optimizer: MasterAdamW, seed: int, names: tuple[str, ...]) -> None:
    """Gradients of `names` through autograd, some of them -0; what "delivered" gets goes to the collector first."""
    generator, own = torch.Generator().manual_seed(seed), optimizer.parameters
    given = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    given = {name: torch.where(value < -1, -0.0, value).to(own[name].dtype) for name, value in given.items()}
    if "delivered" in names:
        collector, part = optimizer.collector(own["delivered"]), given["delivered"].float() * 3
        collector.grad = part if collector.grad is None else collector.grad.add_(part)
    if names:
        sum((own[name] * given[name]).sum() for name in names).backward()


def as_a_graph_does(optimizer: MasterAdamW) -> Callable[[int, tuple[str, ...]], None]:
    accumulators = Accumulators(optimizer.masters)

    def step(seed: int, names: tuple[str, ...]) -> None:
        with deferred(optimizer, {}) as waiting:
            micro_step(optimizer, seed, names)
            accumulators.allocate(waiting)
            accumulators.store(waiting)
            assert waiting == {}
        for master in optimizer.masters.values():
            assert master.grad is None or master.grad is accumulators.buffers[master]

    return step


FEW, MOST = ("wide", "narrow"), tuple(name for name in SHAPES if name != "absent")


@pytest.mark.parametrize(
    "sequence", [(MOST,), (FEW, MOST), (MOST, FEW, MOST), ((), MOST), (("delivered",), FEW, ("delivered",))], ids=str
)
@pytest.mark.parametrize("most", [1, 20, 1 << 26])
def test_stored_gradients_have_the_bits_of_the_optimizer(sequence, most, monkeypatch):
    """bf16 and fp32, of the collector, of some micro-steps alone, and of none; in portions of any size."""
    monkeypatch.setattr(gradients_module, "MOST_CAST", most)
    ours, stock = optimizer_of_all_kinds(), optimizer_of_all_kinds()
    step = as_a_graph_does(ours)
    for _ in range(2):
        for seed, names in enumerate(sequence):
            step(seed, names)
            micro_step(stock, seed, names)
            for (name, mine), theirs in zip(ours.gradients().items(), stock.gradients().values(), strict=True):
                assert (mine is None) is (theirs is None), name
                assert mine is None or same([mine], [theirs]), name
        for optimizer in (ours, stock):
            optimizer.zero_grad()


def test_portions_are_no_larger_than_they_may_be(launches, monkeypatch):
    monkeypatch.setattr(gradients_module, "MOST_CAST", 10)
    pairs = [(torch.zeros(size), torch.ones(size, dtype=torch.bfloat16)) for size in (4, 6, 1, 30, 2, 8, 8)]
    gradients_module._add(pairs)
    assert [[len(buffer) for buffer, _ in one] for one in launches["_foreach_add_"]] == [[4, 6], [1], [30], [2, 8], [8]]
    assert all(torch.equal(buffer, torch.ones_like(buffer)) for buffer, _ in pairs)
    launches["_foreach_add_"].clear()
    gradients_module._add([])
    assert launches["_foreach_add_"] == []
