"""The tripwire: what an optimization exchanged is found, bent and straightened again, and work for nothing is named."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import gradients, tiny, tricky
from torch import Tensor, nn

from abtest import structure
from abtest.catalogue.patching import named, override, pick, use_attention, wrap_head, wrap_micro_step
from abtest.gradients import Distances
from abtest.oracle import exact_gradients, make_exact
from abtest.tripwire import BEND, BentOperator, bent, exchanged, parts, read_tripwire
from loop.attention import attend
from loop.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = "model.layers"


def copied(run: Run, name: str) -> None:
    run.model.set_submodule(name, copy.copy(run.model.get_submodule(name)))


# What is exchanged.


def test_nothing_is_exchanged_in_a_run_left_alone() -> None:
    run, _ = tiny("qwen3.5-tiny")
    before = parts(run)
    run.micro_step(run, tricky(run, 0), 50)
    run.optimizer.step(0)
    assert exchanged(before, run) == []


def test_only_the_outermost_is_named() -> None:
    run, _ = tiny("qwen3.5-tiny")
    before = parts(run)
    layer = copy.copy(run.model.get_submodule(f"{LAYERS}.1"))
    layer._modules = dict(layer._modules)
    run.model.set_submodule(f"{LAYERS}.1", layer)
    for name in (f"{LAYERS}.1.mlp", f"{LAYERS}.1.mlp.up_proj", f"{LAYERS}.2.mlp.up_proj", f"{LAYERS}.2.mlp.down_proj"):
        copied(run, name)
    assert exchanged(before, run) == [f"{LAYERS}.1", f"{LAYERS}.2.mlp.up_proj", f"{LAYERS}.2.mlp.down_proj"]


def test_a_name_that_begins_like_another_is_not_inside_it() -> None:
    run, _ = tiny("qwen3.5-tiny")
    run.model.one, run.model.one_more = nn.Identity(), nn.Identity()
    before = parts(run)
    run.model.one, run.model.one_more = nn.Identity(), nn.Identity()
    assert exchanged(before, run) == ["one", "one_more"]


def test_the_other_seams_are_named() -> None:
    run, _ = tiny("qwen3.5-tiny")
    before = parts(run)
    wrap_head(run, lambda original: lambda *inputs: original(*inputs))
    wrap_micro_step(run, lambda original: lambda *inputs: original(*inputs))
    run.optimizer = copy.copy(run.optimizer)
    assert exchanged(before, run) == ["run.loss_head", "run.micro_step", "run.optimizer"]


def test_another_attention_function_is_the_attention_exchanged() -> None:
    run, _ = tiny("qwen3.5-tiny")
    before = parts(run)
    use_attention(run, "tripwire_test", lambda *inputs, **options: attend(*inputs, **options), "sdpa")
    assert exchanged(before, run) == [f"{LAYERS}.3.self_attn"]


def another_class(module: nn.Module) -> None:
    module.__class__ = type(f"Other{type(module).__name__}", (type(module),), {})


def another_forward(module: nn.Module) -> None:
    original = module.forward
    module.forward = lambda *inputs, **options: original(*inputs, **options)


def a_hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, inputs, out: out)


@pytest.mark.parametrize("change", [another_class, another_forward, a_hook])
def test_a_module_changed_in_place_is_exchanged(change: Callable[[nn.Module], None]) -> None:
    run, _ = tiny("qwen3.5-tiny")
    before = parts(run)
    change(run.model.get_submodule(f"{LAYERS}.0.mlp"))
    assert exchanged(before, run) == [f"{LAYERS}.0.mlp"]


# Bending.


def seen(run: Run) -> tuple[str, dict[str, Tensor]]:
    batch = tricky(run, 1)
    return structure.gradients(run, (batch,))[0], gradients(run, batch)


@pytest.mark.parametrize("what", [f"{LAYERS}.0.linear_attn", f"{LAYERS}.3.self_attn", f"{LAYERS}.3.mlp", "run.loss_head"])
def test_what_is_bent_changes_gradients_and_nothing_stays_bent(what: str) -> None:
    run, _ = tiny("qwen3.5-tiny")
    mark, before = seen(run)
    head, hooks = run.loss_head, [len(module._forward_hooks) for module in run.model.modules()]
    with bent(run, ["run.micro_step", what]) as names:
        assert names == [what]
        assert seen(run)[0] != mark
    after_mark, after = seen(run)
    assert after_mark == mark and all(torch.equal(after[name], before[name]) for name in before)
    assert run.loss_head is head and [len(module._forward_hooks) for module in run.model.modules()] == hooks


def test_an_error_straightens_everything() -> None:
    run, _ = tiny("qwen3.5-tiny")
    mark, head = seen(run)[0], run.loss_head
    with pytest.raises(KeyError), bent(run, [f"{LAYERS}.0.mlp", "run.loss_head"]):
        raise KeyError
    assert run.loss_head is head and seen(run)[0] == mark


def test_a_bent_loss_head_scales_every_gradient() -> None:
    run, _ = tiny("qwen3.5-tiny")
    _, before = seen(run)
    with bent(run, ["run.loss_head"]):
        _, after = seen(run)
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient * BEND, rtol=1e-4, atol=1e-7)


# Operators that a candidate brings along.


def doubled_into(x: Tensor, out: Tensor) -> None:
    out.copy_(2 * x)


@pytest.fixture(scope="module")
def operators():
    """isoloss_test::double, ::doubled_into (writes to its argument), ::count (gives out integers alone)."""
    library = torch.library.Library("isoloss_test", "DEF")
    library.define("double(Tensor x) -> Tensor")
    library.define("doubled_into(Tensor x, Tensor(a!) out) -> ()")
    library.define("count(Tensor x) -> Tensor")
    library.impl("double", lambda x: 2 * x, "CPU")
    library.impl("doubled_into", doubled_into, "CPU")
    library.impl("count", lambda x: torch.tensor([x.shape[-1]]), "CPU")
    yield torch.ops.isoloss_test
    library._destroy()


class _Half(torch.autograd.Function):
    """x out of `double(x / 2)` by way of the operator named; its gradient is the identity."""

    @staticmethod
    def forward(ctx, x: Tensor, operator: Callable[[Tensor], Tensor], used: bool) -> Tensor:
        made = operator(x / 2)
        return made if used else x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


def through(run: Run, operator: Callable[[Tensor], Tensor], used: bool) -> None:
    name = pick(named(run.model, ".mlp"), "first")
    override(run.model, name, "forward", lambda original: lambda x: _Half.apply(original(x), operator, used))


def writes_to(operator: Callable[..., None]) -> Callable[[Tensor], Tensor]:
    def made(x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        operator(x, out)
        return out

    return made


def unreached(run: Run, operator: str) -> bool:
    """As the worker decides: it runs, can be bent, and bending it changes nothing."""
    probe = (tricky(run, 1),)
    untouched = structure.gradients(run, probe)
    with BentOperator(f"isoloss_test::{operator}") as bend:
        found = structure.gradients(run, probe) == untouched and bend.hits > 0
    assert structure.gradients(run, probe) == untouched
    return found


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("writing", [False, True], ids=["returns", "writes"])
def test_an_operator_whose_result_is_thrown_away_is_unreached(operators, writing: bool, used: bool) -> None:
    run, _ = tiny("qwen3.5-tiny")
    through(run, writes_to(operators.doubled_into) if writing else operators.double, used)
    assert unreached(run, "doubled_into" if writing else "double") is not used


def test_an_operator_of_integers_can_not_be_bent(operators) -> None:
    run, _ = tiny("qwen3.5-tiny")
    through(run, lambda x: (2 * x, operators.count(x))[0], used=True)
    assert not unreached(run, "count")


# The whole tripwire: what a gate over bent gradients says.


@dataclasses.dataclass(frozen=True)
class Reference:
    truth: list[dict[str, Tensor]]
    answer: dict
    elements: dict[str, int]


SEEDS = (1, 2, 3)


@pytest.fixture(scope="module", params=["qwen3.5-tiny", "qwen3-tiny"])
def reference(request) -> tuple[str, Reference]:
    torch.set_num_threads(1)
    exact, _ = tiny(request.param)
    dtype = make_exact(exact)
    truth = [{name: g.clone() for name, g in exact_gradients(exact, [tricky(exact, seed)], dtype).items()} for seed in SEEDS]
    run, _ = tiny(request.param)
    distances = measured(run, truth, 3)
    answer = {part: getattr(distances, part) for part in ("error", "norm", "dot")}
    return request.param, Reference(truth, answer, {name: g.numel() for name, g in truth[0].items()})


def measured(run: Run, truth: list[dict[str, Tensor]], count: int) -> Distances:
    distances = Distances()
    for seed, exact in list(zip(SEEDS, truth, strict=True))[:count]:
        distances.add(gradients(run, tricky(run, seed)), exact)
    return distances


def wire(run: Run, before: dict, reference: Reference, folder: Path, unreached: tuple[str, ...] = ()) -> dict:
    own = exchanged(before, run)
    with bent(run, own) as names:
        distances = measured(run, reference.truth, 3)
    rows = folder / "rows.safetensors"
    save_file(distances.rows, rows)
    answer = {part: getattr(distances, part) for part in ("error", "norm", "dot", "elements", "problems")}
    answer |= {"rows": str(rows), "bent": names, "unreached": list(unreached)}
    return read_tripwire("step 10", reference.answer, answer, reference.elements)


def test_a_module_that_is_never_called_does_not_turn_the_gate_red(reference, tmp_path) -> None:
    """A fast MLP is there, and the layer goes on calling the old one."""
    model, facts = reference
    run, _ = tiny(model)
    before = parts(run)
    mlp = run.model.get_submodule(f"{LAYERS}.0.mlp")
    mlp.fast = copy.copy(mlp.up_proj)
    found = wire(run, before, facts, tmp_path)
    assert not found["red"], found
    assert f"first {LAYERS}.0.mlp.fast: its gradients stay within" in found["detail"]


@pytest.mark.parametrize("names", [(".mlp",), (".3.self_attn.q_proj", ".3.self_attn.k_proj"), (".act_fn",)], ids=str)
def test_a_module_that_counts_turns_the_gate_red(reference, names: tuple[str, ...], tmp_path) -> None:
    """Also one with a norm behind it, which would take a common factor out again."""
    model, facts = reference
    run, _ = tiny(model)
    before = parts(run)
    for name in named(run.model, *names):
        copied(run, name)
    found = wire(run, before, facts, tmp_path)
    assert found["red"] and "of its parts bent, first model.layers." in found["detail"]


def test_a_loss_head_and_nothing_turn_the_gate_red(reference, tmp_path) -> None:
    model, facts = reference
    run, _ = tiny(model)
    before = parts(run)
    found = wire(run, before, facts, tmp_path)
    assert found == {"red": True, "detail": "it exchanged no module and no loss head, so there was nothing to bend"}
    wrap_head(run, lambda original: lambda *inputs: original(*inputs))
    found = wire(run, before, facts, tmp_path)
    assert found["red"] and "first run.loss_head" in found["detail"]


def test_an_unreached_operator_is_not_red_whatever_else_is_bent(reference, tmp_path) -> None:
    model, facts = reference
    run, _ = tiny(model)
    before = parts(run)
    copied(run, f"{LAYERS}.0.mlp")
    found = wire(run, before, facts, tmp_path, unreached=("isoloss_test::double",))
    assert found == {"red": False, "detail": "isoloss_test::double runs, but changing its result changes nothing"}
