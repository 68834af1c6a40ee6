"""Waiting for device memory that the arms beside this one hold for the moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

from loop.batch import PackedBatch
from loop.run import Run
from loop.training import accumulate

PATIENCE = 120.0  # seconds for which an arm waits for memory: longer than a noise replica takes, or a probe of the oracle
Answer = TypeVar("Answer")


def patiently(work: Callable[[], Answer], release: Callable[[], None], seconds: float = PATIENCE) -> Answer:
    """What `work` returns; for so long it is done over where device memory is short, since the arms beside this one give
    theirs back between their runs. release: gives back what this process does not need, and undoes half of a `work`."""
    until = time.monotonic() + seconds
    while True:
        try:
            return work()
        except torch.OutOfMemoryError:
            if time.monotonic() >= until:
                raise
        release()  # not in the handler, which holds what was kept
        time.sleep(min(1, seconds / 10))


def accumulated(run: Run, batches: list[PackedBatch], supervised: int, seconds: float = PATIENCE) -> list[float]:
    """`loop.training.accumulate` on a run without gradients; where memory is short, anew with the same random numbers."""
    cpu, own = torch.get_rng_state(), run.device if run.device.type == "cuda" else None
    cuda = None if own is None else torch.cuda.get_rng_state(own)

    def release() -> None:
        run.optimizer.zero_grad()
        torch.set_rng_state(cpu)
        if own is not None:
            torch.cuda.set_rng_state(cuda, own)
            torch.cuda.empty_cache()

    return patiently(lambda: accumulate(run, batches, supervised), release, seconds)
