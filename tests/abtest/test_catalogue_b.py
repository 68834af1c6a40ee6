"""Defects of norms, adapters, state, precision and cheats: each runs, stays finite and changes something it should."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import pytest
import torch
from tiny import duplicate

from abtest.catalogue import Case, cases, cheats, lora, norm_rope, precision, stateful
from abtest.catalogue.patching import with_fields
from abtest.uneven import SPREAD, uneven
from loop.batch import IGNORE, PackedBatch
from loop.config import Config, DataConfig, LoraConfig, OptimConfig
from loop.lora import adapters
from loop.model import trainable
from loop.optim import MasterAdamW
from loop.training import accumulate, build

MODULES = (norm_rope, lora, stateful, precision, cheats)
CASES = [case for module in MODULES for planted in module.PLANTED for case in cases(planted)]
IMITATIONS = {"returns_reference", "does_nothing"}  # bit-equal to what they stand in for
ONLY = {  # what alone they change; everything else changes gradients or weights
    "loss_of_previous": "losses", "norm_misreported": "reported", "mutates_labels": "batch", "mutates_ids": "batch",
    "draws_random_numbers": "rng", "leaves_gradients": "left",
}  # fmt: skip
CUDA_ONLY = {"race", "on_another_stream"}
NARROW = 96  # positions of a row of the batch that has two
CONFIG = Config(
    model="qwen3.5-shallow-tiny", steps=4, device="cpu", dtype="float32", grad_accum=2, repeatable_attention=True,
    lora=LoraConfig(rank=4, alpha=8.0), data=DataConfig(pack_length=192),
    optim=OptimConfig(clip_norm=0.1),  # gradients are larger: it clips
)  # fmt: skip


def two_rows(one: PackedBatch, other: PackedBatch) -> PackedBatch:
    """Two packs as rows of one batch, cut to NARROW positions."""
    names = ("input_ids", "labels", "position_ids")
    ids, labels, positions = (torch.cat([getattr(b, name)[:, :NARROW] for b in (one, other)]) for name in names)
    labels[:, -1] = IGNORE
    bounds = torch.cat([(positions.flatten() == 0).nonzero().flatten(), torch.tensor([2 * NARROW])]).int()
    return PackedBatch(ids, labels, positions, bounds, 2 * NARROW, int((labels != IGNORE).sum()))


def steps_of(dataset) -> list[list[PackedBatch]]:
    """Two steps of two micro-steps: one batch of two short rows, then single packs, one of them twice. Fresh tensors."""
    one, other = dataset.micro_batches(0, 2, 1)
    again = [with_fields(b, labels=b.labels.clone(), input_ids=b.input_ids.clone()) for b in (one, other, one)]
    return [[two_rows(one, other), again[0]], again[1:]]


@functools.cache
def built(method: str):
    return build(dataclasses.replace(CONFIG, method=method))


def observe(method: str, case: Case | None) -> dict:
    """Two training steps from adapters that add something; everything that a plant may have touched."""
    run, dataset = built(method)
    model = duplicate(run.model)
    run = dataclasses.replace(run, model=model, optimizer=MasterAdamW(trainable(model), CONFIG.optim, CONFIG.steps))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for adapter in adapters(model):
            adapter.b.normal_(std=0.02, generator=generator)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(uneven(parameter, SPREAD, generator))
    if case is not None:
        assert case.planted.eligible(run) is None
        case.apply(run)
    torch.manual_seed(0)
    seen: dict = {"losses": [], "reported": []}
    for step, batches in enumerate(steps_of(dataset)):
        seen["losses"] += accumulate(run, batches, sum(batch.supervised_tokens for batch in batches))
        gradients = {n: g for n, g in run.optimizer.gradients().items() if g is not None}
        storages = [g.untyped_storage().data_ptr() for g in gradients.values()]
        seen[f"shared{step}"] = len(storages) - len(set(storages))
        seen |= {f"gradient{step}.{n}": g.clone() for n, g in gradients.items()}
        seen["reported"] += map(float, run.optimizer.step(step))
        seen |= {f"batch{step}.{i}.{f}": getattr(b, f) for i, b in enumerate(batches) for f in ("input_ids", "labels")}
    seen |= {f"tensor.{n}": t.detach() for n, t in (*model.named_parameters(), *model.named_buffers())}
    seen["left"] = [n for n, p in model.named_parameters() if p.grad is not None]
    return seen | {"rng": torch.get_rng_state()}


unplanted = functools.cache(functools.partial(observe, case=None))


def differences(one: dict, other: dict) -> list[str]:
    """What is not bit-equal, or there only once."""

    def same(a, b) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a is b or a == b

    return [key for key in one.keys() | other.keys() if key not in one or key not in other or not same(one[key], other[key])]


@pytest.mark.parametrize("case", [case for case in CASES if case.planted.name not in CUDA_ONLY], ids=lambda case: case.id)
def test_planted_case_runs_and_shows(case: Case, monkeypatch) -> None:
    if case.planted.name == "slice_uninitialised":
        monkeypatch.setattr(torch, "empty_like", torch.ones_like)  # whatever memory held before, here it is one
    method = case.planted.methods[0]
    seen, expected = observe(method, case), unplanted(method)
    assert all(math.isfinite(value) for value in seen["losses"] + seen["reported"])
    assert all(bool(torch.isfinite(t).all()) for t in seen.values() if isinstance(t, torch.Tensor) and t.is_floating_point())
    changed = differences(seen, expected)
    if case.planted.name in IMITATIONS:
        assert not changed
    elif case.planted.name in ONLY:
        assert changed and all(key.startswith(ONLY[case.planted.name]) for key in changed)
    else:
        assert any(key.startswith(("gradient", "tensor")) for key in changed)


@pytest.mark.parametrize("module", MODULES)
def test_every_family_is_large_enough_and_cited(module) -> None:
    assert len({planted.name for planted in module.PLANTED}) >= 6
    for planted in module.PLANTED:
        assert planted.family == module.PLANTED[0].family and planted.kind == "mutant"
        assert re.search(r"\d{2,}|KernelBench", planted.modelled_on)
        small, large = planted.magnitudes
        assert small < large and planted.unit


def test_what_needs_a_gpu_says_so() -> None:
    run, _ = build(CONFIG)
    reasons = {case.planted.name: case.planted.eligible(run) for case in CASES}
    assert {name for name, reason in reasons.items() if reason is not None} == CUDA_ONLY
