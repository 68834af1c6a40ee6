"""Defects of normalisation, packing, the delta rule and the head: each runs, stays finite and changes some gradient."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import pytest
import torch
from tiny import duplicate

from abtest.catalogue import Case, cases, cross_entropy, delta_rule, normalisation, packing
from abtest.catalogue.patching import with_fields
from abtest.catalogue.planted import Planted
from abtest.probes import tricky_batch
from abtest.uneven import SPREAD, uneven
from loop.batch import IGNORE, PackedBatch
from loop.config import Config, DataConfig, LoraConfig
from loop.lora import adapters
from loop.model import forward_body, trainable
from loop.optim import MasterAdamW
from loop.run import Run
from loop.training import accumulate, build

MODULES = (normalisation, packing, delta_rule, cross_entropy)
CASES = [(method, case) for m in MODULES for p in m.PLANTED for method in p.methods for case in cases(p)]
CONFIDENT = {"true_class_rounded", "logits_rounded"}  # shows where p(label) is almost 1
GRADUAL = re.compile(r"scale|exponent|bits|size|part of the (gradient|way|saved|mean|second)")  # units where 0 is harmless
ROUNDING = 5e-6  # relative; the noisiest gradient, of four biases, differs by 2e-6 between honest ways to take a softmax
CONFIG = Config(
    steps=4, device="cpu", dtype="float32", grad_accum=2, repeatable_attention=True,
    lora=LoraConfig(rank=4, alpha=8.0), data=DataConfig(pack_length=192),
)  # fmt: skip


@functools.cache
def built(method: str, model: str = "qwen3.5-shallow-tiny") -> Run:
    """Adapters that add something, vectors that are uneven, and slow decays in every other head, so that a state that leaks
    is still there."""
    run, _ = build(dataclasses.replace(CONFIG, method=method, model=model))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for adapter in adapters(run.model):
            adapter.b.normal_(std=0.02, generator=generator)
        for name, parameter in run.model.named_parameters():
            if name.endswith("A_log"):
                parameter[::2] = math.log(0.05)
            elif parameter.ndim == 1:
                parameter.copy_(uneven(parameter, SPREAD, generator))
    return run


def fresh(method: str) -> Run:
    run, model = built(method), duplicate(built(method).model)
    return dataclasses.replace(run, model=model, optimizer=MasterAdamW(trainable(model), CONFIG.optim, CONFIG.steps))


@functools.cache
def batches(method: str, confident: bool) -> list[PackedBatch]:
    """A row, and two rows; for a confident model every label is what it predicts."""
    own = [tricky_batch(192 // packs, packs, built(method).model.config.vocab_size, packs) for packs in (1, 2)]
    if not confident:
        return own
    run = sure(fresh(method))
    with torch.no_grad():
        best = [run.model.get_output_embeddings()(forward_body(run.model, batch)).argmax(-1) for batch in own]
    return [with_fields(b, labels=b.labels.where(b.labels == IGNORE, top)) for b, top in zip(own, best, strict=True)]


@torch.no_grad()
def sure(run: Run) -> Run:
    run.model.get_decoder().norm.weight.fill_(20.0)
    return run


def observe(method: str, case: Case | None, confident: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Loss sums and gradients of one step of two unequal micro-steps."""
    run = sure(fresh(method)) if confident else fresh(method)
    if case is not None:
        assert case.planted.eligible(run) is None
        case.apply(run)
    own = batches(method, confident)
    losses = accumulate(run, own, sum(batch.supervised_tokens for batch in own))
    return losses, {name: g for name, g in run.optimizer.gradients().items() if g is not None}


unplanted = functools.cache(functools.partial(observe, case=None))


def largest_change(method: str, case: Case, confident: bool = False) -> float:
    """The relative change of the gradient that changes most. Everything must be there and finite."""
    losses, gradients = observe(method, case, confident)
    right = unplanted(method=method, confident=confident)[1]
    assert all(math.isfinite(loss) for loss in losses) and gradients.keys() == right.keys()
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())
    return max(float((gradients[name] - g).norm() / g.norm()) for name, g in right.items() if g.any())


@pytest.mark.parametrize(("method", "case"), CASES, ids=lambda value: value.id if isinstance(value, Case) else value)
def test_planted_case_runs_and_shows(method: str, case: Case) -> None:
    assert largest_change(method, case, confident=case.planted.name in CONFIDENT) > 10 * ROUNDING


@pytest.mark.parametrize("planted", [p for m in MODULES for p in m.PLANTED if GRADUAL.search(p.unit)], ids=lambda p: p.name)
def test_without_strength_nothing_is_wrong(planted: Planted) -> None:
    assert largest_change(planted.methods[-1], Case(planted, planted.layers[-1], 0.0)) < ROUNDING


@pytest.mark.parametrize("module", MODULES)
def test_every_family_is_large_enough_and_cited(module) -> None:
    assert len({planted.name for planted in module.PLANTED}) == len(module.PLANTED) >= 6
    for planted in module.PLANTED:
        assert planted.family == module.__name__.rpartition(".")[2] and planted.kind == "mutant"
        assert re.search(r"\d{2,}", planted.modelled_on) and planted.unit
        assert 0 < planted.magnitudes[0] < planted.magnitudes[1]


def test_a_dense_model_refuses_what_needs_delta_layers() -> None:
    run = built("lora", "qwen3-tiny")
    refused = {p.name for m in MODULES for p in m.PLANTED if p.eligible(run) is not None}
    needy = {p.name for m in (packing, delta_rule) for p in m.PLANTED}
    assert refused == needy - {"attention_leak", "positions_restart_late"}
