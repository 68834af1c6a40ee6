"""keep_activations: no bit changes, and every layer runs forward once instead of twice."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from kernels.keep_activations.patch import apply, eligible
from loop import lora
from loop.batch import IGNORE, PackedBatch
from loop.config import Config, LoraConfig, OptimConfig
from loop.model import cross_entropy_head, load_model, plain_micro_step, trainable
from loop.optim import MasterAdamW
from loop.run import Run

VOCABULARY = 128


def run_of(model: str, dropout: float = 0.0, checkpointing: bool = True) -> Run:
    config = Config(
        model=model, device="cpu", gradient_checkpointing=checkpointing, lora=LoraConfig(rank=4, dropout=dropout)
    )
    built = load_model(config, VOCABULARY)
    lora.attach(built, config.lora, seed=0)
    with torch.no_grad():
        for adapter in lora.adapters(built):
            adapter.b.normal_(std=0.1)  # so that A has a gradient too
    optimizer = MasterAdamW(trainable(built), OptimConfig(), 1)
    return Run(config, torch.device("cpu"), torch.float32, built, cross_entropy_head, plain_micro_step, optimizer)


def batch_of(*lengths: int) -> PackedBatch:
    ids = torch.randint(VOCABULARY, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    ends = torch.tensor((0, *lengths)).cumsum(0)
    labels = ids.roll(-1, dims=1)
    labels[0, ends[1:] - 1] = IGNORE
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return PackedBatch(ids, labels, positions, ends.to(torch.int32), sum(lengths), int((labels != IGNORE).sum()))


def outcome(run: Run, batch: PackedBatch) -> tuple[list[torch.Tensor], Counter]:
    """Loss, gradients and random state of one micro-step, and how often each decoder layer was entered."""
    calls: Counter = Counter()
    parameters = trainable(run.model).values()
    for parameter in parameters:
        parameter.grad = None
    hooks = [
        layer.register_forward_pre_hook(lambda *_, index=index: calls.update([index]))  # recomputation ends early
        for index, layer in enumerate(run.model.get_decoder().layers)
    ]
    torch.manual_seed(4)
    loss = run.micro_step(run, batch, batch.supervised_tokens)
    for hook in hooks:
        hook.remove()
    return [loss, *(parameter.grad.clone() for parameter in parameters), torch.get_rng_state()], calls


@pytest.mark.parametrize(("model", "dropout"), [("qwen3.5-shallow-tiny", 0.2), ("llama-tiny", 0.0)])
def test_no_bit_changes_and_each_layer_runs_once(model, dropout):
    run, batch = run_of(model, dropout), batch_of(20, 3, 41)
    layers = range(run.model.config.num_hidden_layers)
    recomputed, calls = outcome(run, batch)
    assert calls == Counter({index: 2 for index in layers})
    assert eligible(run) is None
    apply(run)
    kept, calls = outcome(run, batch)
    assert calls == Counter({index: 1 for index in layers})
    for one, other in zip(kept, recomputed, strict=True):
        assert torch.equal(one, other)
    assert any(bool(gradient.any()) for gradient in kept[1:-1])


@pytest.mark.parametrize("trained", [False, True], ids=["frozen embeddings", "trained embeddings"])
def test_only_trained_embeddings_ask_for_a_gradient(trained):
    run, asked = run_of("llama-tiny"), []
    run.model.get_input_embeddings().weight.requires_grad_(trained)
    run.model.get_decoder().layers[0].register_forward_pre_hook(lambda layer, given: asked.append(given[0].requires_grad))
    outcome(run, batch_of(5, 8))
    assert set(asked) == {True}
    asked.clear()
    apply(run)
    outcome(run, batch_of(5, 8))
    assert asked == [trained]


def test_says_so_where_nothing_is_recomputed():
    run = run_of("llama-tiny", checkpointing=False)
    assert eligible(run) == "the run recomputes nothing: gradient checkpointing is off"
    run = run_of("llama-tiny")
    apply(run)
    assert eligible(run) == "the run recomputes nothing: gradient checkpointing is off"


def test_refuses_where_memory_is_short(monkeypatch):
    run = run_of("llama-tiny")
    run.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 10, 1 << 40))
    assert "would take about" in eligible(run)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    assert eligible(run) is None
