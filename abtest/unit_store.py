"""Outcomes of finished units of a sensitivity run, kept until the run is whole: a run of half an hour may be cut."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abtest.units import Unit
from loop.files import write_text

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("abtest", "kernels", "loop", "negative_results")  # what an outcome depends on, besides the packages
Outcome = tuple[list[dict[str, Any]], list[dict[str, Any]]]  # lines of the cases, and of the sweep


def identity(environment: dict[str, Any]) -> str:
    """A digest of the project's sources, the device and the packages: an outcome of other code is no outcome of this."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    known = {key: environment.get(key) for key in ("device_slug", "device", "versions", "python", "driver", "cuda")}
    digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class UnitStore:
    """One JSON file a unit in `folder`; what cannot be read counts as not there."""

    folder: Path
    identity: str

    def path(self, unit: Unit) -> Path:
        key = hashlib.sha256(f"{self.identity} {unit!r}".encode()).hexdigest()[:24]
        return self.folder / f"{key}.json"

    def get(self, unit: Unit) -> Outcome | None:
        """What an earlier run found for the same unit, or None."""
        try:
            kept = json.loads(self.path(unit).read_text(encoding="utf-8"))
            return list(kept["lines"]), list(kept["sweep"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, unit: Unit, outcome: Outcome) -> None:
        lines, sweep = outcome
        write_text(self.path(unit), json.dumps({"lines": lines, "sweep": sweep}))

    def clear(self, units: list[Unit]) -> None:
        """Forgets these units: the run that needed them is written."""
        for unit in units:
            self.path(unit).unlink(missing_ok=True)
