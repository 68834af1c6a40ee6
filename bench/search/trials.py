"""What a search timed: one JSON line a trial in reports/data/search/<device_slug>.jsonl, only ever appended.

A trial is two sets of optimizations, timed in turn. Its sets were not gated, so nothing of it is a claim about either: it
says which way the search went, and what each member of its answer is worth there.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abtest import jsonl
from abtest.jsonl import expect, keys, one_of, strings, whole
from bench import by_device
from bench.ledger import STATE_OF_THE_CODE
from loop.errors import UserError

SCHEMA = 1
FOLDER = "search"
FORWARD, EXCHANGE, LEAVE_ONE_OUT = STAGES = ("forward", "exchange", "leave-one-out")
TIMES = ("ratio", "ratio_low", "ratio_high", "micro_step_ms", "against_micro_step_ms", "real_tokens_per_s")
COUNTS = ("blocks", "peak_memory_bytes", "against_peak_memory_bytes", "launches")
MEMORY_MARGIN = 0.01  # what a member must save of the peak to be worth keeping although it saves no time
Set = tuple[str, ...]  # optimizations that are on together, sorted


@dataclass(frozen=True)
class Timing:
    """Of one set beside another, or `why` there is none: it was refused, or ended. Milliseconds are medians.

    ratio: time of the other set over this one's (above 1 is faster), with its 95 % interval. Peak memory is the device's; it
    and launches are counted where one was left out on a GPU.
    """

    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    blocks: int | None = None
    micro_step_ms: float | None = None
    against_micro_step_ms: float | None = None
    real_tokens_per_s: float | None = None
    peak_memory_bytes: int | None = None
    against_peak_memory_bytes: int | None = None
    launches: int | None = None
    why: str | None = None

    def __post_init__(self) -> None:
        missing = [name for name in (*TIMES, "blocks") if getattr(self, name) is None]
        if (self.why is None) != (not missing) or len(missing) not in (0, len(TIMES) + 1):
            raise ValueError(f"a trial has its times or a reason for having none; without a value: {', '.join(missing)}")
        for name in TIMES if self.why is None else ():
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, not a positive number")


@dataclass(frozen=True)
class Trial:
    """One set beside another, the best so far. candidates: all that this search is among, which makes it another search."""

    run_id: str
    stage: str
    round: int
    against: Set
    optimizations: Set
    timing: Timing
    candidates: Set
    command: str
    environment: dict[str, Any]
    recipe: dict[str, Any]
    finished_at: str  # ISO 8601, UTC
    schema: int = field(default=SCHEMA)

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"record schema {self.schema} is not {SCHEMA}")
        one_of(self.stage, STAGES, "stage")
        jsonl.moment(self.finished_at)
        if self.against == self.optimizations:
            raise ValueError("a set is compared with itself")
        if self.stage == LEAVE_ONE_OUT and (self.added or len(self.left_out) != 1):
            raise ValueError("one is to be left out, and nothing added")

    @property
    def added(self) -> Set:
        return tuple(name for name in self.optimizations if name not in self.against)

    @property
    def left_out(self) -> Set:
        return tuple(name for name in self.against if name not in self.optimizations)

    @property
    def faster(self) -> bool:
        """Whether the whole interval is above 1."""
        return self.timing.why is None and self.timing.ratio_low > 1

    @property
    def gain(self) -> tuple[float, float, float] | None:
        """What that which was left out is worth: time without it over time with it, and the ends of its 95 % interval."""
        timing = self.timing
        return None if timing.why is not None else (1 / timing.ratio, 1 / timing.ratio_high, 1 / timing.ratio_low)

    @property
    def saves_memory(self) -> bool:
        """Whether the peak is lower with what was left out."""
        without, kept = self.timing.peak_memory_bytes, self.timing.against_peak_memory_bytes
        return without is not None and kept is not None and kept < without * (1 - MEMORY_MARGIN)

    @property
    def needed(self) -> bool:
        """Whether what was left out stays on: time or memory is lost without it, or the rest does not run."""
        return self.gain is None or self.gain[1] > 1 or (self.gain[2] >= 1 and self.saves_memory)


def from_json(line: str) -> Trial:
    """Raises one of `abtest.jsonl.DAMAGE` for a line that is no valid trial."""
    fields = keys(expect(json.loads(line), dict, "the line"), [f.name for f in dataclasses.fields(Trial)], "it")
    for name, kind in (
        ("run_id", str), ("command", str), ("finished_at", str), ("environment", dict), ("recipe", dict), ("timing", dict),
    ):  # fmt: skip
        expect(fields[name], kind, name)
    for name in ("against", "optimizations", "candidates"):
        fields[name] = strings(fields[name], name)
    whole(fields["round"], "round")
    return Trial(**fields | {"timing": _timing(fields["timing"])})


def _timing(fields: dict[str, Any]) -> Timing:
    keys(fields, [f.name for f in dataclasses.fields(Timing)], "timing")
    for name in COUNTS:
        if fields[name] is not None:
            whole(fields[name], name)
    if fields["why"] is not None:
        expect(fields["why"], str, "why")
    return Timing(**jsonl.numbers(fields, TIMES))


def path_of(reports: Path, device_slug: str) -> Path:
    return reports / "data" / FOLDER / f"{device_slug}.jsonl"


def read(path: Path) -> list[Trial]:
    """Every trial of a file, in order. Raises UserError naming file and line for one that is not valid, or of a device that
    is not the file's."""
    return by_device.read(path, from_json)


def load(data_dir: Path) -> dict[str, list[Trial]]:
    """By device slug, every trial in `data_dir`/search/<device_slug>.jsonl, in order; devices without any are left out."""
    return by_device.load(data_dir / FOLDER, read)


class TrialLedger:
    """The trials of one search: those of run `run_id` among `candidates` in the file `path`."""

    def __init__(self, path: Path, run_id: str, candidates: Sequence[str], facts: dict[str, Any]) -> None:
        """facts: command, environment and recipe of this command. Raises UserError for trials of this run that another
        recipe or another state of the code has made, as `bench.ledger.Ledger.check` does."""
        self.path, self.facts = path, facts | {"run_id": run_id, "candidates": tuple(sorted(candidates))}
        of_run = [trial for trial in read(path) if trial.run_id == run_id] if path.exists() else []
        for trial in of_run:
            _check_same(trial, self.facts)
        same = [trial for trial in of_run if trial.candidates == self.facts["candidates"]]
        self.known = {(trial.stage, trial.against, trial.optimizations): trial for trial in same}

    def keep(self, stage: str, number: int, against: Set, optimizations: Set, timing: Timing, finished_at: str) -> Trial:
        """Appends a trial of round `number` to the file."""
        trial = Trial(
            stage=stage, round=number, against=against, optimizations=optimizations, timing=timing, finished_at=finished_at,
            **self.facts,
        )  # fmt: skip
        jsonl.append(self.path, jsonl.dumps(trial))
        self.known[stage, against, optimizations] = trial
        return trial


def _check_same(trial: Trial, facts: dict[str, Any]) -> None:
    where = f"--run {trial.run_id}: searched with"
    for key, words in STATE_OF_THE_CODE.items():
        had, has = trial.environment.get(key), facts["environment"].get(key)
        if had != has:
            raise UserError(f"{where} {words} {had}, but now {has}; take another --run")
    now = jsonl.plain(facts["recipe"])
    for key in sorted({*trial.recipe, *now}):
        if trial.recipe.get(key) != now.get(key):
            raise UserError(f"{where} {key} = {trial.recipe.get(key)}, but now {now.get(key)}; take another --run")
