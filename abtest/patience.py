"""Waiting for device memory that the arms beside this one hold for the moment."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from loop.batch import PackedBatch
from loop.random_state import RandomState
from loop.run import Run
from loop.training import accumulate

PATIENCE = 120.0  # seconds for which an arm waits for memory: longer than a noise replica takes, or a probe of the oracle
QUEUE = 600.0  # and for its turn to wait: those before it may want memory for a whole command
Answer = TypeVar("Answer")


def patiently(work: Callable[[], Answer], release: Callable[[], None], seconds: float = PATIENCE) -> Answer:
    """What `work` returns; for so long it is done over where device memory is short, since the arms beside this one give
    theirs back between their runs. release: gives back what this process does not need, and undoes half of a `work`.

    Of all that lack memory one tries again at a time: two that each want more than half of a device would take it from each
    other for ever.
    """
    try:
        return work()
    except torch.OutOfMemoryError:
        if not seconds:
            raise
    release()  # not in the handler, which holds what was kept
    with _turn(QUEUE):
        until = time.monotonic() + seconds
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                if time.monotonic() >= until:
                    raise
            release()
            time.sleep(min(1, seconds / 10))


@contextmanager
def _turn(seconds: float) -> Iterator[None]:
    """A turn among this user's processes on the same devices; taken without it where it does not come in `seconds`."""
    devices = re.sub(r"\W", "_", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    until = time.monotonic() + seconds
    path = Path(tempfile.gettempdir()) / f"isoloss-{os.getuid()}-memory-{devices}.lock"
    # Nobody else's link is followed in a folder where all may write.
    with os.fdopen(os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600), "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < until:
                    time.sleep(0.1)
                    continue
            break
        yield  # closing the file ends the turn, and so does the end of the process


def accumulated(run: Run, batches: list[PackedBatch], supervised: int, seconds: float = PATIENCE) -> list[float]:
    """`loop.training.accumulate` on a run without gradients; where memory is short, anew with the same random numbers."""
    random = RandomState(run.device)

    def release() -> None:
        run.optimizer.zero_grad()
        random.restore()
        torch.cuda.empty_cache()  # nothing happens where there is no device

    return patiently(lambda: accumulate(run, batches, supervised), release, seconds)
