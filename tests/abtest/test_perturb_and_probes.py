"""Kicked references and the batches that gradients are compared on."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from abtest.perturb import kick
from abtest.probes import FAR, TRICKY_LENGTHS, probe_batches, tricky_batch
from loop.batch import IGNORE
from loop.config import OptimConfig
from loop.data.dataset import Dataset, Document
from loop.optim import MasterAdamW


def small_run(dtype: torch.dtype) -> SimpleNamespace:
    """A frozen and a trained layer; a third of the trained weights are zero, one of them -0."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"frozen": nn.Linear(64, 96), "trained": nn.Linear(96, 60)}).to(dtype)
    model["frozen"].requires_grad_(False)
    with torch.no_grad():
        model["trained"].weight[::3] = 0.0
        model["trained"].weight[0, 0] = -0.0
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return SimpleNamespace(device=torch.device("cpu"), model=model, optimizer=MasterAdamW(trained, OptimConfig(), 3))


def kicked(dtype: torch.dtype, seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], SimpleNamespace]:
    run = small_run(dtype)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    kick(run, seed)
    return before, {name: p.detach() for name, p in run.model.named_parameters()}, run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_about_half_the_weights_move_by_exactly_one_ulp(dtype):
    before, after, _ = kicked(dtype, seed=1)
    up = down = total = 0
    for name, old in before.items():
        new, (above, below) = (
            after[name],
            (torch.nextafter(old, torch.full_like(old, end)) for end in (torch.inf, -torch.inf)),
        )
        assert torch.equal(new[old == 0].signbit(), old[old == 0].signbit()) and not new[old == 0].any()
        assert bool(((new == old) | (new == above) | (new == below)).all())
        up, down, total = up + int((new > old).sum()), down + int((new < old).sum()), total + int((old != 0).sum())
    assert up / total == pytest.approx(0.25, abs=0.02) and down / total == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masters_follow_the_weights(dtype):
    _, after, run = kicked(dtype, seed=1)
    for name, master in run.optimizer.masters.items():
        assert master.dtype is torch.float32 and torch.equal(master, after[name].float())


def test_a_kick_is_a_function_of_its_seed():
    one, again, other = (kicked(torch.float32, seed)[1]["frozen.weight"] for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


@given(st.integers(2, 700), st.integers(1, 12), st.integers(0, 5))
def test_a_tricky_batch_keeps_the_rules_of_a_batch(pack_length, packs, seed):
    batch = tricky_batch(pack_length, packs, 50, seed)
    bounds, ids, labels = batch.cu_seqlens.tolist(), batch.input_ids.flatten(), batch.labels.flatten()
    assert (bounds[0], bounds[-1], batch.real_tokens) == (0, packs * pack_length, packs * pack_length)
    assert set(range(0, packs * pack_length + 1, pack_length)) <= set(bounds)
    assert batch.supervised_tokens == int((labels != IGNORE).sum())
    assert int(ids.min()) >= 0 and int(ids.max()) < 50
    for start, end in pairwise(bounds):
        assert end > start
        assert batch.position_ids.flatten()[start:end].tolist() == list(range(end - start))
        assert labels[end - 1] == IGNORE
        supervised = (labels[start:end] != IGNORE).nonzero().flatten()
        assert torch.equal(labels[start:end][supervised], ids[start:end][supervised + 1])
        assert not (supervised % 3 == 0).any()


def test_a_tricky_batch_holds_what_trips_kernels():
    batch = tricky_batch(512, 2, 4096, seed=0)
    assert {1, 2, 3} <= set(batch.lengths) and {63, 64, 65, 128} <= set(batch.lengths)
    assert tuple(batch.lengths[: len(TRICKY_LENGTHS)]) == TRICKY_LENGTHS
    assert any(bound % 64 for bound in batch.cu_seqlens.tolist())
    long_and_ignored = [
        end - start
        for start, end in pairwise(batch.cu_seqlens.tolist())
        if end - start > 3 and (batch.labels.flatten()[start:end] == IGNORE).all()
    ]
    assert long_and_ignored  # a document that teaches nothing
    assert not torch.equal(batch.input_ids, tricky_batch(512, 2, 4096, seed=1).input_ids)


def dataset() -> Dataset:
    draw = np.random.default_rng(0)
    documents = tuple(Document.from_mask(draw.integers(0, 90, 32, dtype=np.int32), draw.random(32) < 0.5) for _ in range(40))
    return Dataset(documents, tuple((2 * i, 2 * i + 1) for i in range(20)), 64, 0, {}, "here", 0)


@pytest.mark.parametrize("packs", [1, 2])
def test_every_fourth_probe_is_tricky_and_the_others_are_real(packs):
    made = dataset()
    probes = probe_batches(made, 9, packs, 90)
    again = probe_batches(made, 9, packs, 90)
    for index, (batch, same) in enumerate(zip(probes, again, strict=True)):
        assert batch.input_ids.shape == (packs, 64) and torch.equal(batch.input_ids, same.input_ids)
        real = made.micro_batches(FAR + index, 1, packs)[0]
        assert torch.equal(batch.input_ids, real.input_ids) == (index % 4 != 3)
    assert len({tuple(batch.input_ids.flatten().tolist()) for batch in probes}) == 9
