"""An arm for which device memory is short waits until those beside it have given theirs back, and measures the same."""

from __future__ import annotations

import io

import pytest
import torch
from safetensors.torch import save_file
from tiny import CONFIG

from abtest import examiner
from abtest.examiner import patiently
from abtest.gradients import Distances
from abtest.probes import probes
from abtest.projection import keep
from abtest.worker import Worker
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
    patched.setattr(examiner.time, "sleep", lambda seconds: None)
