"""Settings: what stock trained when arms were compared with it. Arms are only ever compared within one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.records import Record
from bench.report import text
from loop.shapes import is_tiny
from loop.shipping import ASSISTANT

BASELINES = ("reference", "repeat")


@dataclass(frozen=True)
class Trained:
    """What stock trained. "" or None where the record does not say; one that says nothing of `supervise` had no choice yet,
    and supervised what the assistant wrote."""

    model: str
    method: str
    pack_length: int | None  # tokens
    dtype: str
    supervise: str = ASSISTANT
    rank: int | None = None  # of LoRA's adapters

    @property
    def order(self) -> tuple:
        """Real shapes before tiny ones, LoRA before full fine-tuning, long packs before short ones, usual targets first, and
        high ranks before low ones."""
        return (
            is_tiny(self.model), self.model, self.method != "lora", self.method, -(self.pack_length or 0), self.dtype,
            self.supervise != ASSISTANT, self.supervise, -(self.rank or 0),
        )  # fmt: skip


def trained(record: Record) -> Trained:
    """What the recipe of `record` says; dtype is the one that ran."""
    return trained_by(record.recipe, text.dtype(record))


def trained_by(recipe: Mapping[str, Any], dtype: object) -> Trained:
    """What a recipe says."""
    data = recipe.get("data")
    data = data if isinstance(data, Mapping) else {}
    length, lora = data.get("pack_length"), recipe.get("lora")
    rank = lora.get("rank") if isinstance(lora, Mapping) and recipe.get("method") == "lora" else None
    return Trained(
        model=str(recipe.get("model") or ""),
        method=str(recipe.get("method") or ""),
        pack_length=length if type(length) is int else None,
        dtype=str(dtype or ""),
        supervise=str(data.get("supervise") or ASSISTANT),
        rank=rank if type(rank) is int else None,
    )


def beside(record: Record, run: Sequence[Record]) -> list[Record]:
    """The reference and repeat records of one run that an arm may have been measured beside.

    A run may be several commands, one after another or side by side, each with stock of its own. Those of the same words
    cannot be told apart, so it is all of theirs; for a command without stock it is all of the run's.
    """
    every = [other for other in run if other.role in BASELINES]
    return [other for other in every if other.command == record.command] or every


def reference_of(record: Record, run: Sequence[Record]) -> Record | None:
    """The newest reference beside an arm, None where there is none."""
    return next((other for other in reversed(beside(record, run)) if other.role == "reference"), None)


def folder_names(settings: Sequence[Trained]) -> list[str]:
    """A folder name for each: model, method, pack length, dtype and unusual targets in lower-case letters, digits, dots and
    dashes. Of a path or hub id only the last part shows. Those that then look alike get their rank, and if that does not
    tell them apart a hash of the whole."""
    names = _apart([_slug(one) for one in settings], [f"r{one.rank}" for one in settings])
    return _apart(names, [hashlib.sha256(repr(one).encode("utf-8", "replace")).hexdigest()[:8] for one in settings])


def _apart(names: Sequence[str], ends: Sequence[str]) -> list[str]:
    """Each name that others have, too, with its end, if their ends differ."""
    own = [{end for other, end in zip(names, ends, strict=True) if other == name} for name in names]
    return [f"{name}-{end}" if len(alike) > 1 else name for name, end, alike in zip(names, ends, own, strict=True)]


def _slug(one: Trained) -> str:
    last = next((part for part in reversed(re.split(r"[/\\]", one.model)) if part.strip(".")), "")
    targets = "" if one.supervise == ASSISTANT else f"supervise-{one.supervise}"
    parts = (last[:60] or "unnamed", one.method, one.pack_length, one.dtype, targets)
    words = [re.sub(r"[^a-z0-9.]+", "-", str(part).lower()).strip("-.") for part in parts if part not in ("", None)]
    return "-".join(word for word in words if word) or "unnamed"
