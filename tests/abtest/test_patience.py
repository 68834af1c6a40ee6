"""An arm for which device memory is short waits until those beside it have given theirs back, and measures the same."""

from __future__ import annotations

import dataclasses
import io
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import CONFIG

from abtest import examiner, patience, perturb, structure
from abtest import worker as module
from abtest.free_run import initial_file
from abtest.gradients import Distances
from abtest.patience import patiently
from abtest.probes import probes
from abtest.projection import keep
from abtest.worker import COMMANDS, OVER_AGAIN, Worker
from loop.recipe import to_plain


def failing(times: int, error: Exception) -> list:
    """What can be asked for, after it failed so often; and how often it was asked."""
    asked = []

    def work() -> str:
        asked.append(len(asked))
        if len(asked) <= times:
            raise error
        return "done"

    return [work, asked]


@pytest.mark.parametrize("times", [0, 1, 3])
def test_what_lacks_memory_is_done_over_when_there_is_some(times):
    (work, asked), released = failing(times, torch.OutOfMemoryError("CUDA out of memory")), []
    assert patiently(work, lambda: released.append(1), seconds=0.5) == "done"
    assert (len(asked), len(released)) == (times + 1, times)


def test_memory_that_never_comes_is_said():
    work, asked = failing(10**6, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        patiently(work, lambda: None, seconds=0.1)
    assert len(asked) > 1


def test_of_those_that_lack_memory_one_tries_again_at_a_time():
    """Each begins anew only when the other is through, or has given up."""
    seen, begun = [], threading.Barrier(2)

    def work_of(name: str) -> Callable[[], str]:
        tries = []

        def work() -> str:
            tries.append(name)
            if len(tries) == 1:
                begun.wait(5)
                raise torch.OutOfMemoryError("CUDA out of memory")
            seen.append(name)
            time.sleep(0.2)
            seen.append(name)
            return name

        return work

    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(patiently, work_of(name), lambda: None, 0.5) for name in "ab"]
        assert [one.result() for one in both] == ["a", "b"]
    assert seen in (["a", "a", "b", "b"], ["b", "b", "a", "a"])


def test_a_turn_that_does_not_come_is_taken():
    with patience._turn(0):
        began = time.monotonic()
        with patience._turn(0.3):
            assert 0.2 < time.monotonic() - began < 5


def test_anything_else_is_an_error_at_once():
    work, asked = failing(1, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal"):
        patiently(work, lambda: None, seconds=1)
    assert len(asked) == 1


@pytest.mark.parametrize("at", ["backward", "truth"])
def test_a_probe_that_lacked_memory_counts_once(at, tmp_path, monkeypatch):
    """Gradients of the micro-steps before are gone then, and nothing of the truth was added up."""
    worker = Worker(io.StringIO())
    worker.build(to_plain(CONFIG), [])
    probe = probes(worker.dataset, 4, 2, worker.run.model.config.vocab_size)[0]
    exact = {name: torch.randn(p.shape) for name, p in worker.run.model.named_parameters() if p.requires_grad}
    file = tmp_path / "truth.safetensors"
    save_file(keep({name.replace(".default", ""): g for name, g in exact.items()}, "tokens"), file)
    seen = []
    for short in (False, True):
        distances, marks = Distances(), []
        with monkeypatch.context() as patched:
            if short:
                _short(patched, at, worker)
            worker._measure(probe, str(file), distances, marks)
        seen.append((marks, distances.error, distances.norm, distances.problems))
    assert seen[0] == seen[1] and not seen[0][3]


def _short(patched: pytest.MonkeyPatch, at: str, worker: Worker) -> None:
    """Memory is short, once, behind the last backward or where the oracle's gradients are read."""
    name = "accumulate" if at == "backward" else "load_file"
    original, asked = getattr(examiner, name), []

    def first_short(*arguments, **named):
        result = original(*arguments, **named)
        asked.append(name)
        if len(asked) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    patched.setattr(examiner, name, first_short)
    patched.setattr(patience.time, "sleep", lambda seconds: None)


def _short_once(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, times: tuple[int, ...] = (2,)) -> list[int]:
    """Memory is short at those calls of `where.name`, once its work is done. Answers with what was called."""
    original, calls = getattr(where, name), []

    def first_short(*arguments, **named):
        result = original(*arguments, **named)
        calls.append(len(calls) + 1)
        if len(calls) in times:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(where, name, first_short)
    return calls


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_a_step_that_lacked_memory_is_begun_anew_with_the_same_random_numbers(dropout, monkeypatch):
    """In the second of its two micro-steps: the first one's gradients are dropped."""
    config = dataclasses.replace(CONFIG, grad_accum=2, lora=dataclasses.replace(CONFIG.lora, dropout=dropout))
    seen = []
    for short in (False, True):
        worker = Worker(io.StringIO())
        worker.build(to_plain(config), [])
        with monkeypatch.context() as patched:
            plain, calls = worker.run.micro_step, []

            def micro_step(*arguments, plain=plain, calls=calls, short=short):
                result = plain(*arguments)
                calls.append(len(calls) + 1)
                if short and len(calls) == 4:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return result

            worker.run.micro_step = micro_step
            patched.setattr(patience.time, "sleep", lambda seconds: None)
            seen.append(worker.free_run(3))
        assert len(calls) == (8 if short else 6)
    assert seen[0] == seen[1]


@pytest.mark.parametrize(("where", "name", "time"), [(patience, "accumulate", 1), (perturb, "_kicked", 2)])
def test_a_kicked_replica_that_keeps_everything_does_not_wait(where, name, time, monkeypatch):
    """For a step or a kick: it recomputes instead, at once."""
    worker = Worker(io.StringIO())
    worker.build(to_plain(CONFIG), [])
    worker.remember()
    plain = worker.replica(2, {}, 1, kept=True)["loss"]
    _short_once(monkeypatch, where, name, (time,))
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: pytest.fail("it waits"))
    assert worker.replica(2, {}, 1, kept=True) == {"loss": plain, "kept": False, "roomy": False}


@pytest.mark.parametrize("command", ["build", "resume"])
def test_a_run_that_found_no_memory_is_built_once_more(command, monkeypatch):
    wanted, worker = Worker(io.StringIO()), Worker(io.StringIO())
    built = wanted.build(to_plain(CONFIG), [])
    if command == "resume":
        worker.build(to_plain(CONFIG), [])
        worker.rest()
    calls = _short_once(monkeypatch, module, "build", (1,))
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: None)
    if command == "build":
        assert worker.build(to_plain(CONFIG), []) == built
    else:
        worker.resume()
    assert calls == [1, 2] and worker.free_run(2) == wanted.free_run(2)


def test_a_kick_that_found_no_memory_is_the_same_kick(monkeypatch):
    """Of the third weight: those before it are not kicked twice."""
    seen = []
    for short in (False, True):
        worker = Worker(io.StringIO())
        worker.build(to_plain(CONFIG), [])
        with monkeypatch.context() as patched:
            calls = _short_once(patched, perturb, "_kicked", (3,) if short else ())
            patched.setattr(patience.time, "sleep", lambda seconds: None)
            perturb.kick(worker.run, 1)
        weights = list(worker.run.model.parameters())
        assert len(calls) == len(weights) + short
        seen.append(weights)
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))


def test_what_begins_anew_is_asked_once_more(tmp_path, monkeypatch):
    worker = Worker(io.StringIO())
    worker.build(to_plain(CONFIG), [])
    asked = {"weights": initial_file(worker.held, worker.run, tmp_path), "state": "step 0", "count": 3, "seed": 0}
    wanted = worker.carry_out("structure", asked | {"indexes": [0, 1, 2], "repeats": 2})
    calls = _short_once(monkeypatch, structure, "repeated", (1,))
    assert worker.carry_out("structure", asked | {"indexes": [0, 1, 2], "repeats": 2}) == wanted and calls == [1, 2]
    assert set(OVER_AGAIN) < set(COMMANDS)


def test_an_update_makes_way_where_two_runs_are_too_many(monkeypatch):
    """And the arm's own run is there again behind it."""
    worker = Worker(io.StringIO())
    worker.build(to_plain(CONFIG), [])
    asked = {"weights": "", "state": "step 0", "count": 3, "seed": 0, "alone": False}
    wanted, gone = worker.carry_out("update", asked), []
    monkeypatch.setattr(worker, "_let_go", lambda: gone.append(Worker._let_go(worker)))
    calls = _short_once(monkeypatch, examiner, "check_update", (1,))
    assert worker.carry_out("update", asked) == wanted and calls == [1, 2] and len(gone) == 1
    assert worker.free_run(1)["loss"]
