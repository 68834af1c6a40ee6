"""supervised_mlp: supervised rows have the MLP's output and gradients, others get nothing, and only a layer that leaves
positions alone is swapped."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from graphed import CONFIG, made, outcome, pack, same
from hypothesis import given, settings
from hypothesis import strategies as st
from micro_steps import step
from torch import nn

from kernels.contract import Workload
from kernels.cuda_graphs import inputs as static
from kernels.cuda_graphs.inputs import ROWS
from kernels.cuda_graphs.micro_step import CAPTURES, REPLAYS
from kernels.registry import enable
from kernels.supervised_mlp import OPTIMIZATION
from kernels.supervised_mlp.kernel import LEAST_ROWS, mlp_of_rows, on_rows
from kernels.supervised_mlp.layer import SupervisedLayer, SupervisedMLP
from kernels.supervised_mlp.patch import apply, eligible, last_layer, leaves_positions_alone
from kernels.supervised_mlp.reference import mlp_then_rows
from loop.batch import IGNORE
from loop.config import LoraConfig
from loop.training import build

CPU = torch.device("cpu")
MODELS = ("qwen3.5-turned-tiny", "qwen3.5-shallow-tiny", "qwen3-shallow-tiny", "qwen2-tiny", "llama-tiny", "mistral-tiny")
SHAPE = {"B": 2, "L": 80, "D": 32, "F": 48, "trained": 1}
NUMBERS = (0, 1, LEAST_ROWS - 1, LEAST_ROWS, 97, 160)


def inputs(supervised: int):
    return OPTIMIZATION.op.inputs(Workload("case", SHAPE | {"S": supervised}, "float32"), CPU, 0)


def swapped(model: str, **changes):
    run, _ = made(model, graphed=False, **changes)
    assert eligible(run) is None
    apply(run)
    return run


# The function


@pytest.mark.parametrize("supervised", NUMBERS)
def test_rows_and_gradients_are_the_reference_s(supervised):
    found = []
    for function in (mlp_of_rows, mlp_then_rows):
        mlp, x, rows = inputs(supervised)
        y = function(mlp, x, rows)
        incoming = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
        found.append([y.detach(), *torch.autograd.grad(y, [x, *mlp.parameters()], incoming)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@given(st.sets(st.integers(0, 159)), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_other_rows_are_zero_forward_and_backward(chosen, seed):
    x = torch.randn(2, 80, 3, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    rows = torch.tensor(sorted(chosen), dtype=torch.int64)
    seen = []
    y = on_rows(lambda rows: seen.append(rows.shape) or rows * rows, x, rows)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    counts = torch.zeros(160, dtype=torch.bool)
    counts[rows if len(rows) >= LEAST_ROWS else slice(None)] = True
    assert seen == [(len(rows), 3) if len(rows) >= LEAST_ROWS else (2, 80, 3)]
    flat = x.detach().view(160, 3) * counts[:, None]
    assert torch.equal(y.view(160, 3), flat * flat) and torch.equal(dx.view(160, 3), 2 * flat)


def test_a_row_that_comes_twice_must_have_no_gradient_and_then_harms_nobody():
    """As a graph fills rows up: with the last position, whose label is always ignored."""
    x = torch.randn(1, 100, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rows, incoming = torch.arange(90), torch.ones(1, 100, 3)
    incoming[:, 99] = 0
    padded = torch.cat([rows, torch.full((30,), 99)])
    found = [torch.autograd.grad(on_rows(lambda x: x * x, x, own), x, incoming)[0] for own in (rows, padded)]
    assert torch.equal(*found) and not found[0][0, 90:].any()


# The swap


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("model", MODELS)
def test_a_micro_step_is_the_reference_s(model, method):
    one, other = made(model, graphed=False, method=method)[0], swapped(model, method=method)
    batch = pack(one, 3, rows=2)
    assert LEAST_ROWS <= batch.supervised_tokens < batch.positions
    want, got = step(one, batch), step(other, batch)
    assert got.keys() == want.keys()
    for name, value in want.items():
        scale = value.abs().max()
        torch.testing.assert_close(
            got[name] / scale, value / scale, rtol=0, atol=3e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("model", ["qwen3.5-turned-tiny", "llama-tiny"])
def test_the_last_mlp_sees_supervised_rows_and_the_others_all(model, checkpointing):
    run, seen = swapped(model, gradient_checkpointing=checkpointing), []
    for layer in run.model.get_decoder().layers:
        layer.mlp.down_proj.register_forward_hook(lambda module, given, y: seen.append(y.shape[:-1]))
    batch = pack(run, 3)
    run.micro_step(run, batch, batch.supervised_tokens)
    last, first = (batch.supervised_tokens,), (1, batch.positions)
    assert set(seen) == {first, last} and seen.count(last) == 1 + checkpointing


def test_names_parameters_and_classes_stay():
    run, _ = made("qwen3.5-turned-tiny", graphed=False)
    layer = last_layer(run.model)
    before, kinds = dict(run.model.named_parameters()), (type(layer), type(layer.mlp))
    apply(run)
    after = dict(run.model.named_parameters())
    assert list(before) == list(after) and all(before[name] is after[name] for name in before)
    replaced = last_layer(run.model)
    assert isinstance(replaced, kinds[0]) and isinstance(replaced, SupervisedLayer) and replaced.training
    assert isinstance(replaced.mlp, kinds[1]) and isinstance(replaced.mlp, SupervisedMLP)


def test_without_a_pack_every_position_is_computed():
    run = swapped("qwen3.5-turned-tiny")
    plain, _ = made("qwen3.5-turned-tiny", graphed=False)
    batch = pack(run, 3)
    run.micro_step(run, batch, 1)  # and nothing of the last pack is left
    ids = torch.arange(1, 41)[None]
    with torch.no_grad():
        assert torch.equal(run.model(input_ids=ids).logits, plain.model(input_ids=ids).logits)


def test_a_forward_that_breaks_off_leaves_no_rows_behind():
    run = swapped("llama-tiny")
    handle = last_layer(run.model).mlp.down_proj.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.micro_step(run, pack(run, 3), 1)
    handle.remove()
    assert last_layer(run.model).mlp.supervised_rows is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels on a CPU need Triton's interpreter")
def test_it_comes_behind_those_that_swap_the_same_modules():
    run, _ = build(dataclasses.replace(CONFIG, model="qwen3.5-turned-tiny", lora=LoraConfig(rank=4)))
    enable(run, ["supervised_mlp", "silu_mul", "rms_norm", "lora_matmul"])
    assert run.enabled == ["lora_matmul", "rms_norm", "silu_mul", "supervised_mlp"] and not run.refused
    kinds = [kind.__name__ for own in (last_layer(run.model), last_layer(run.model).mlp) for kind in type(own).__mro__[:3]]
    assert {"FusedDecoderLayer", "SupervisedLayer", "FusedMLP", "SupervisedMLP"} <= set(kinds)


@pytest.mark.usefixtures("taped")
def test_graphs_fill_its_rows_up():
    run, plain = (made("qwen3-shallow-tiny", graphed=graphed)[0] for graphed in (True, False))
    for own in (run, plain):
        apply(own)
    for seed, lengths in enumerate(((5, 60), (100,), (50, 50))):
        batch = pack(run, seed, lengths=lengths)
        assert same(outcome(run, batch), outcome(plain, static.with_padded_rows(batch))), lengths
    assert run.micro_step.asked == {ROWS}
    assert run.micro_step.counts[REPLAYS] == 3 and run.micro_step.counts[CAPTURES] <= 2


def test_the_last_position_that_fills_rows_up_is_never_supervised():
    run, _ = made("qwen3-shallow-tiny", graphed=False)
    assert bool((pack(run, 3, rows=2).labels[:, -1] == IGNORE).all())


# What it refuses


class Mixing(nn.Module):
    """A decoder layer that does something with its MLP's output that `how` names."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.mlp = how, nn.Identity()

    def forward(self, x, **_):
        y = self.mlp(x)
        if self.how == "the mean of all":
            y = y - y.mean(1, keepdim=True)
        elif self.how == "the position before":
            y = y.roll(1, dims=1)
        elif self.how == "twice":
            y = y + self.mlp(x)
        elif self.how == "in part":
            y = torch.cat([self.mlp(x[:, :1]), y[:, 1:]], dim=1)
        elif self.how == "not at all":
            y = torch.zeros_like(x)
        return (x + y,) if self.how == "as a tuple" else x + y


@pytest.mark.parametrize("how", ["the mean of all", "the position before", "twice", "in part", "not at all", "as a tuple"])
def test_a_layer_that_brings_positions_together_is_told_apart(how):
    assert not leaves_positions_alone(Mixing(how)) and leaves_positions_alone(Mixing("added"))


class MeanNorm(nn.Module):
    def forward(self, x):
        return x - x.mean(1, keepdim=True)


def _hook(run) -> None:
    last_layer(run.model).register_forward_hook(lambda *_: None)


def _mlp_hook(run) -> None:
    last_layer(run.model).mlp.register_forward_hook(lambda *_: None)


def _relu(run) -> None:
    last_layer(run.model).mlp.act_fn = nn.ReLU()


def _dropout(run) -> None:
    last_layer(run.model).mlp.up_proj = nn.Sequential(last_layer(run.model).mlp.up_proj, nn.Dropout(0.1))


def _norm(run) -> None:
    run.model.model.norm = MeanNorm()


def _no_layers(run) -> None:
    run.model.model.layers = nn.ModuleList()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_hook, "hooks"), (_mlp_hook, "not of the form"), (_relu, "not of the form"), (_dropout, "drops at random"),
        (_norm, "brings positions together"), (_no_layers, "no decoder with"),
    ],
)  # fmt: skip
def test_it_says_why_not(change, words):
    run, _ = made("qwen3-shallow-tiny", graphed=False)
    change(run)
    assert words in eligible(run)


@pytest.mark.parametrize("fused", [False, True])
def test_a_lora_layer_s_dropout_is_seen(fused):
    run, _ = made("qwen3-shallow-tiny", graphed=False, lora=LoraConfig(rank=4, dropout=0.1))
    if fused:
        enable(run, ["lora_matmul"])
    assert "drops at random" in eligible(run)


def test_least_work_by_hand():
    frozen, trained = (Workload("case", SHAPE | {"S": 10, "trained": trained}, "bfloat16") for trained in (0, 1))
    product, weights = 2 * 10 * 32 * 48, 3 * 32 * 48
    assert [OPTIMIZATION.op.flops(w) for w in (frozen, trained)] == [6 * product, 9 * product]
    positions = 3 * 10 * 32 + 160 * 32
    assert [OPTIMIZATION.op.bytes_moved(w) for w in (frozen, trained)] == [
        2 * (2 * weights + positions), 2 * (3 * weights + positions)
    ]  # fmt: skip
