"""What may be searched, and where to begin: optimizations that passed the gate in this setting on this device.

By its newest record alone; one that has none, as a member of a combination that passed. What such a member is worth alone is
not known then, and a set that it is part of goes through the gate as every answer does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.plan import JOIN, check_apart, untimed_reason
from bench.records import Record
from bench.search.trials import Set
from kernels import registry
from kernels.contract import Optimization
from loop.config import Config
from loop.errors import UserError

ONLY = "only what has passed its gate here, alone or with others, is searched"
HOW_MEASURED = ("gate", "timing", "steps")  # of a recipe: how much evidence there is, not what was trained


@dataclass(frozen=True)
class Candidate:
    """ratio: stock's time over its own, alone, in its newest record; 1 where that has no time, or there is none. timed:
    whether its work is in the micro-step, which is what a search times."""

    name: str
    ratio: float
    timed: bool = True


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
    here = [record for record in found if same_training(record.recipe, recipe)]
    newest = {record.arm: record for record in here if record.role == "optimization"}
    passed = {
        name
        for record in here
        if record.role == "combination" and record.verdict.level.lossless
        for name in record.optimizations
    }
    known = {name: one for name, one in registry.discover().items() if not registry.is_negative(name)}
    reasons = {name: _obstacle(one, newest.get(name), name in passed, config, device) for name, one in known.items()}
    for name in names:
        _check_name(name, reasons)
    others = {name: why for name, why in reasons.items() if why is not None}
    asked = names or known
    chosen = [
        Candidate(name, _ratio(newest.get(name)), not one.in_update)
        for name, one in known.items()
        if name not in others and name in asked
    ]
    if not chosen:
        raise UserError(f"nothing to search: {in_words(others)}; `python -m bench.run` with the same recipe comes first")
    return chosen, others


def _check_name(name: str, reasons: dict[str, str | None]) -> None:
    if name not in reasons:
        raise UserError(f"--arms {name}: {_unknown(name)}; there are {', '.join(reasons)}")
    if reasons[name] is not None:
        raise UserError(f"--arms {name}: {reasons[name]}; {ONLY}")


def _unknown(name: str) -> str:
    return "a negative result, which never ships" if name in registry.discover() else "no such optimization"


def beginning(
    given: Sequence[str], chosen: Sequence[Candidate], others: dict[str, str], conflict: Callable[[str, str], bool]
) -> Set:
    """The set that a search among `chosen` begins with: the names `given`, some perhaps joined by `JOIN`. others: who is no
    candidate, and why. Raises UserError for one that is not searched or there twice, and for two that conflict."""
    among = [candidate.name for candidate in chosen]
    names = [name for words in given for name in words.split(JOIN)]
    for index, name in enumerate(names):
        if name in others:
            raise UserError(f"--begin {name}: {others[name]}; {ONLY}: {', '.join(among)}")
        if name not in among:
            known = name in registry.discover() and not registry.is_negative(name)
            why = "not one of --arms" if known else _unknown(name)
            raise UserError(f"--begin {name}: {why}; searched are {', '.join(among)}")
        if name in names[:index]:
            raise UserError(f"--begin {name}: it is there twice")
        check_apart(name, names[:index], conflict, f"--begin {name}")
    return tuple(sorted(names))


def _obstacle(
    optimization: Optimization, record: Record | None, passed: bool, config: Config, device: torch.device
) -> str | None:
    """Why it is no candidate, or None. record: the newest of it alone; passed: with others, in a combination."""
    if registry.with_recipes(config, [optimization.name]) != config:
        return "compared with stock of a recipe of its own"
    if registry.unmet(optimization.needs, device) is not None:
        return "can't run on this machine"
    if untimed_reason([optimization], device) is not None:
        return "not timed on this machine"
    if record is None:
        return None if passed else "no record in this setting"
    return None if record.verdict.level.lossless else record.verdict.level.value


def _ratio(record: Record | None) -> float:
    ratio = record.perf.ratio if record is not None and record.perf is not None else 1.0
    return ratio if math.isfinite(ratio) else 1.0


def in_words(others: dict[str, str]) -> str:
    """Who is no candidate, by reason, in one line."""
    groups: dict[str, list[str]] = {}
    for name, why in others.items():
        groups.setdefault(why, []).append(name)
    return "; ".join(f"{why}: {', '.join(names)}" for why, names in groups.items())
