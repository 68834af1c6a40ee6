"""The oracle's gradients on disk: computed once for a model, its weights and a probe, whoever asks.

Named by what determines them, so nothing has to be invalidated: a file of another model is never looked at. The oldest go
first when the folder grows beyond its budget.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
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


class OracleCache:
    """Gradient files under `folder`, at most `budget` bytes of them, and never more than half of the free disk."""

    def __init__(self, folder: Path, budget: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.budget = min(budget, self.held() + shutil.disk_usage(folder).free // 2)

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
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    def _make_room(self, wanted: int) -> None:
        files = sorted(self.folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
        held = sum(path.stat().st_size for path in files)
        for path in files:
            if held + wanted <= self.budget:
                return
            held -= path.stat().st_size
            path.unlink(missing_ok=True)
