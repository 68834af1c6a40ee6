"""loop.train as a function: repeatable, callable again, honest in its log, stopped by a loss that is no number."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import registry
from loop.errors import UserError
from loop.optim import learning_rate
from loop.training import NonFiniteLoss, build, train, train_step

ROOT = Path(__file__).resolve().parents[2]


def numbers(log) -> list[tuple[float, float, float]]:
    return [(step.loss, step.loss_sum, step.grad_norm) for step in log.steps]


@pytest.mark.parametrize("model", ["qwen3.5-tiny", "llama-tiny"])
def test_training_twice_in_one_process_gives_the_same_numbers(make, model):
    config = make(model=model, lora={"dropout": 0.1})
    first = train(config)
    other = train(make(model=model, seed=1, lora={"dropout": 0.1}))
    torch.rand(7)
    again = train(config)
    assert numbers(first) == numbers(again)
    assert numbers(first) != numbers(other)
    assert all(math.isfinite(loss) for loss in first.losses)


def test_an_optimization_that_claims_the_same_bits_trains_the_same(make):
    config = make(lora={"dropout": 0.1})
    log = train(config, ("static_lora",))
    assert log.enabled == ("static_lora",) and not log.refused
    assert numbers(log) == numbers(train(config))


def test_what_an_optimization_draws_changes_nothing(make, monkeypatch):
    config = make(lora={"dropout": 0.3})
    expected = numbers(train(config))
    monkeypatch.setattr(registry, "enable", lambda run, names: torch.rand(1000))
    assert numbers(train(config)) == expected


def test_training_learns(make):
    log = train(make(steps=12, method="full", optim={"lr": 3e-3}))
    assert log.losses[-1] < 0.8 * log.losses[0]


def test_the_log_says_what_each_step_did(make):
    config = make(steps=3, grad_accum=2, data={"packs_per_micro_step": 2})
    seen = []
    log = train(config, on_step=seen.append)
    _, dataset = build(config)
    assert log.steps == tuple(seen) and [step.step for step in log.steps] == [0, 1, 2]
    for step in log.steps:
        batches = dataset.micro_batches(step.step, 2, 2)
        assert step.positions == 2 * 2 * 128
        assert step.real_tokens == sum(batch.real_tokens for batch in batches) <= step.positions
        assert step.supervised_tokens == sum(int((batch.labels != -100).sum()) for batch in batches)
        assert step.loss == step.loss_sum / step.supervised_tokens
        assert step.lr == learning_rate(config.optim, step.step, config.steps)
        assert step.grad_norm > 0 and step.seconds > 0 and step.peak_memory_bytes is None
    assert log.losses == tuple(step.loss for step in log.steps)
    assert (log.enabled, log.refused, log.interrupted, log.save_seconds) == ((), {}, False, 0.0)
    assert log.data == dataset.statistics() and log.data["documents"] == 48
    json.dumps(dataclasses.asdict(log))


def test_a_refused_optimization_is_in_the_log(make):
    log = train(make(steps=1), ("keep_activations",))
    assert log.enabled == () and "gradient checkpointing is off" in log.refused["keep_activations"]


def test_an_overflowing_rate_stops_with_step_and_batch(make):
    with pytest.raises(NonFiniteLoss, match=r"^step 1\b.* is (nan|inf).*micro_batches\(step=1\)"):
        train(make(steps=5, method="full", optim={"lr": 1e30, "warmup_steps": 0}))


def test_a_poisoned_weight_stops_the_step(make):
    run, dataset = build(make(method="full"))
    with torch.no_grad():
        run.model.get_decoder().layers[2].mlp.up_proj.weight[3, 5] = math.inf
    with pytest.raises(NonFiniteLoss, match=r"step 7, micro-step 0: the loss is nan; .*micro_batches\(step=7\)\[0\]"):
        train_step(run, dataset, 7)


def test_the_bad_one_of_several_micro_steps_is_named(make):
    run, dataset = build(make(grad_accum=3))
    plain, calls = run.micro_step, []

    def poisoned(run, batch, supervised):
        calls.append(batch)
        loss = plain(run, batch, supervised)
        return loss * math.nan if len(calls) == 2 else loss

    run.micro_step = poisoned
    with pytest.raises(NonFiniteLoss, match=r"micro-step 1.*micro_batches\(step=0\)\[1\]"):
        train_step(run, dataset, 0)


def test_a_gradient_that_is_no_number_stops_too(make):
    run, dataset = build(make())
    plain = run.micro_step

    def poisoned(run, batch, supervised):
        loss = plain(run, batch, supervised)
        next(g for g in run.optimizer.gradients().values() if g is not None).fill_(math.nan)
        return loss

    run.micro_step = poisoned
    with pytest.raises(NonFiniteLoss, match=r"step 0: the gradient norm is nan .*micro_batches\(step=0\)"):
        train_step(run, dataset, 0)


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("steps", {"steps": 0}),
        ("grad_accum", {"grad_accum": 0}),
        ("save_every", {"save_every": -1}),
        ("seed", {"seed": -1}),
        ("seed", {"seed": 2**64}),
        ("data.pack_length", {"data": {"pack_length": 1}}),
        ("data.packs_per_micro_step", {"data": {"packs_per_micro_step": 0}}),
        ("lora.rank", {"lora": {"rank": 0}}),
        ("lora.alpha", {"lora": {"alpha": math.nan}}),
        ("lora.dropout", {"lora": {"dropout": 1.0}}),
        ("optim.lr", {"optim": {"lr": math.inf}}),
        ("optim.lr", {"optim": {"lr": math.nan}}),
        ("optim.beta1", {"optim": {"beta1": 1.0}}),
        ("optim.beta2", {"optim": {"beta2": -0.1}}),
        ("optim.eps", {"optim": {"eps": -1e-8}}),
        ("optim.weight_decay", {"optim": {"weight_decay": -1.0}}),
        ("optim.warmup_steps", {"optim": {"warmup_steps": -1}}),
        ("optim.min_lr_ratio", {"optim": {"min_lr_ratio": 1.5}}),
        ("optim.clip_norm", {"optim": {"clip_norm": math.nan}}),
    ],
)
def test_numbers_no_run_can_have_are_refused_by_name(make, key, changes):
    with pytest.raises(UserError, match=rf"\b{key} is "):
        build(make(**changes))


def test_the_package_offers_train_and_config():
    code = "import loop; print(loop.train.__module__, loop.Config.__module__, loop.RunLog.__name__)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.split() == ["loop.training", "loop.config", "RunLog"]


def test_the_function_survives_an_import_of_the_command(make):
    import importlib

    import loop

    importlib.import_module("loop.train")  # python puts the module where the function was
    assert len(loop.train(make(steps=1)).steps) == 1
