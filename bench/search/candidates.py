"""What may be searched: optimizations whose newest record in this setting on this device is lossless."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.plan import untimed_reason
from bench.records import Record
from kernels import registry
from kernels.contract import Optimization
from loop.config import Config
from loop.errors import UserError

HOW_MEASURED = ("gate", "timing", "steps")  # of a recipe: how much evidence there is, not what was trained


@dataclass(frozen=True)
class Candidate:
    """ratio: stock's time over its own, alone, in its newest record; 1 where that has no time."""

    name: str
    ratio: float


def same_training(recipe: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether both train the same: model, method, data, dtype and all else that is not how it was measured."""
    first, second = ({k: v for k, v in one.items() if k not in HOW_MEASURED} for one in (recipe, other))
    return first == second


def candidates(
    found: Sequence[Record], recipe: dict[str, Any], config: Config, device: torch.device, names: Sequence[str] = ()
) -> tuple[list[Candidate], dict[str, str]]:
    """The candidates in `found`, the device's records, oldest first; and every other optimization with why it is none.

    names: only these; all of them must be candidates. Raises UserError for one that is not, and where there is none at all.
    """
    newest = {
        record.arm: record for record in found if record.role == "optimization" and same_training(record.recipe, recipe)
    }
    known = {name: one for name, one in registry.discover().items() if not registry.is_negative(name)}
    reasons = {name: _obstacle(one, newest.get(name), config, device) for name, one in known.items()}
    for name in names:
        _check_name(name, reasons)
    others = {name: why for name, why in reasons.items() if why is not None}
    chosen = [Candidate(name, _ratio(newest[name])) for name in known if name not in others and (not names or name in names)]
    if not chosen:
        raise UserError(f"nothing to search: {in_words(others)}; `python -m bench.run` with the same recipe comes first")
    return chosen, others


def _check_name(name: str, reasons: dict[str, str | None]) -> None:
    if name not in reasons:
        words = "a negative result, which never ships" if name in registry.discover() else "no such optimization"
        raise UserError(f"--arms {name}: {words}; there are {', '.join(reasons)}")
    if reasons[name] is not None:
        raise UserError(f"--arms {name}: {reasons[name]}; only what has passed its gate here alone is searched")


def _obstacle(optimization: Optimization, record: Record | None, config: Config, device: torch.device) -> str | None:
    """Why it is no candidate, or None."""
    if registry.with_recipes(config, [optimization.name]) != config:
        return "compared with stock of a recipe of its own"
    if registry.unmet(optimization.needs, device) is not None:
        return "can't run on this machine"
    if untimed_reason([optimization], device) is not None:
        return "not timed on this machine"
    if record is None:
        return "no record in this setting"
    return None if record.verdict.level.lossless else record.verdict.level.value


def _ratio(record: Record) -> float:
    ratio = record.perf.ratio if record.perf is not None else 1.0
    return ratio if math.isfinite(ratio) else 1.0


def in_words(others: dict[str, str]) -> str:
    """Who is no candidate, by reason, in one line."""
    groups: dict[str, list[str]] = {}
    for name, why in others.items():
        groups.setdefault(why, []).append(name)
    return "; ".join(f"{why}: {', '.join(names)}" for why, names in groups.items())
