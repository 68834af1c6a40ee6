"""The oracle's gradients on disk: computed once for a model, its weights and a probe, whoever asks.

Named by what determines them, so nothing has to be invalidated: a file of another model is never looked at. The oldest go
first when the folder grows beyond its budget, but none that a gate may still be about to read: several of them may share the
folder, and one that takes more than the budget would throw out its own.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from loop.files import write_safetensors

ROOT = Path(__file__).resolve().parent.parent
# What the oracle computes with: when one of these changes, so may its answers.
SOURCES = (
    "abtest/oracle.py", "abtest/probes.py", "abtest/projection.py",
    "loop/attention.py", "loop/batch.py", "loop/delta_net.py", "loop/lora.py", "loop/model.py",
)  # fmt: skip


@cache
def version() -> str:
    """A digest of the sources that the oracle's answers depend on, and of the libraries that it runs on."""
    digest = hashlib.blake2b(digest_size=20)
    for name in SOURCES:
        digest.update((ROOT / name).read_bytes())
    for package in ("torch", "transformers", "peft"):
        digest.update(f"{package} {metadata.version(package)}".encode())
    return digest.hexdigest()


RECENT = 3600.0  # seconds since a file was used last in which a gate may want it again


class OracleCache:
    """Gradient files under `folder`: at most `budget` bytes of those that no gate has used in the last hour, and together
    never more than `room`, which leaves half of the free disk to others."""

    def __init__(self, folder: Path, budget: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.budget = folder, budget
        self.room = self.held() + shutil.disk_usage(folder).free // 2

    def path(self, *facts: object) -> Path:
        """The file of what `facts` determine: fingerprints of model, weights and probe, dtypes; and of `version`."""
        text = "\n".join(map(str, (version(), *facts)))
        return self.folder / f"{hashlib.blake2b(text.encode(), digest_size=20).hexdigest()}.safetensors"

    def get(self, path: Path, make: Callable[[], tuple[Mapping[str, torch.Tensor], dict[str, str]]]) -> dict[str, str]:
        """Makes sure that `path` is there and can be read. `make` gives the gradients and notes about them; answers with the
        notes."""
        try:
            with safe_open(path, "pt") as file:
                notes = dict(file.metadata() or {})
            os.utime(path)  # used last
            return notes
        except (FileNotFoundError, SafetensorError):  # not there, or cut short by a full disk
            gradients, notes = make()
        gradients = {name: value.cpu().contiguous() for name, value in gradients.items()}
        self._make_room(sum(value.nbytes for value in gradients.values()))
        write_safetensors(path, gradients, metadata=notes)
        return notes

    def held(self) -> int:
        return sum(size for _, size, _ in self._files())

    def _files(self) -> list[tuple[float, int, Path]]:
        """Time of the last use, bytes and path, the oldest first. Others may be at work here: a file may be gone already."""
        found = []
        for path in self.folder.glob("*.safetensors"):
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        return sorted(found)

    def _make_room(self, wanted: int) -> None:
        files = self._files()
        held = sum(size for _, size, _ in files)
        for used, size, path in files:
            recent = time.time() - used < RECENT
            if held + wanted <= (self.room if recent else min(self.budget, self.room)):
                return
            held -= size
            path.unlink(missing_ok=True)
