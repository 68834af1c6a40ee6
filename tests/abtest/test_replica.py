"""A worker's kicked references: the same bits whether they recompute or not, and whatever the arm trained before."""

from __future__ import annotations

import dataclasses
import io
from types import SimpleNamespace

import pytest
import torch
from tiny import CONFIG

from abtest import worker as module
from abtest.worker import ROOM, Worker
from loop.recipe import to_plain

STEPS, SEED = 3, 5
CHECKPOINTED = dataclasses.replace(CONFIG, gradient_checkpointing=True)


@pytest.fixture(scope="module")
def asked() -> Worker:
    worker = Worker(io.StringIO())
    worker.build(to_plain(CHECKPOINTED), [])
    worker.remember()
    return worker


def test_a_replica_has_the_same_bits_whether_it_recomputes_or_not(asked, monkeypatch):
    recomputing, original = [], module.free_run

    def watched(run, *arguments):
        recomputing.append(any(getattr(own, "gradient_checkpointing", False) for own in run.model.modules()))
        return original(run, *arguments)

    monkeypatch.setattr(module, "free_run", watched)
    kept, again = (asked.replica(STEPS, {}, SEED, kept=kept) for kept in (True, False))
    assert recomputing == [False, True] and (kept["kept"], again["kept"]) == (True, False)
    assert kept["loss"] == again["loss"] and len(set(kept["loss"])) == STEPS
    assert asked.replica(STEPS, {}, SEED + 1, kept=True)["loss"] != kept["loss"]


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_replica_for_which_memory_is_short_is_run_again_and_recomputes(at, asked, monkeypatch):
    """From the start: weights and moments have moved by then, and there may be gradients."""
    expected, original, tried = asked.replica(STEPS, {}, SEED, kept=False), module.free_run, []

    def short(run, dataset, steps, on_step, *rest):
        def step(done, total):
            if done > at and len(tried) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")

        tried.append(steps)
        return original(run, dataset, steps, step, *rest)

    monkeypatch.setattr(module, "free_run", short)
    assert asked.replica(STEPS, {}, SEED, kept=True) == expected
    assert len(tried) == 2


def test_a_replica_that_recomputes_and_lacks_memory_says_so(asked, monkeypatch):
    def short(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "free_run", short)
    with pytest.raises(torch.OutOfMemoryError):
        asked.replica(STEPS, {}, SEED, kept=False)


@pytest.mark.parametrize(("recomputing", "expected"), [(None, False), (100, True), (101, False)])
def test_a_gpu_is_roomy_if_the_others_have_theirs_besides(recomputing, expected, asked, monkeypatch):
    """Which is known once a replica has recomputed."""
    total = SimpleNamespace(total_memory=100 * ROOM)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)
    monkeypatch.setattr(asked, "recomputing", recomputing)
    assert asked._roomy()
    assert not asked._large(), "a second process is worth its start where there is no GPU to fill"
    monkeypatch.setattr(asked, "run", SimpleNamespace(device=torch.device("cuda")))
    assert asked._roomy() is asked._large() is expected
