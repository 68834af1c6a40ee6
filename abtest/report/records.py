"""The truth behind a gate page: one JSON line a run of `python -m abtest.run`, only ever appended."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from abtest import jsonl
from abtest.jsonl import expect, keys, number, one_of, series, strings, whole
from abtest.verdict import Level, Verdict
from loop.errors import UserError

SCHEMA = 1
TEXT_FIELDS = ("run_id", "command", "finished_at", "name", "claim", "summary", "why_exact")
MAPPINGS = ("environment", "recipe", "data", "census", "autotune", "seconds")
SERIES = ("losses", "reference_losses", "noise_sigma")
TRACE_KEYS = ("module", "phase", "same_bits", "relative", "beside")
CENSUS_KEYS = ("reference", "candidate", "new", "gone")
OP_KEYS = ("workload", "seed", "level", "reason")


@dataclass(frozen=True)
class GateRecord:
    """One arm through the whole gate.

    name: the optimization's (several joined), or the case that was planted. claim: the author's, "bitwise" for example.
    losses, reference_losses, noise_sigma: per step, as in the loss check. trace: rows {"module", "phase": "forward" or
    "backward", "same_bits", "relative", "beside"} in the order of computation; relative: the distance of candidate and
    reference over the reference's norm, beside: that of reference and oracle. census: {"reference", "candidate": what ran,
    counted by name or by kind and name; "new", "gone": names}, empty where the candidate did not get that far. op: rows
    {"workload", "seed", "level", "reason"} and perhaps "op". autotune: the configuration that each kernel chose.
    seconds: "prepare", "candidate", "total", and "arm: command" for what an arm was asked to do.
    """

    run_id: str
    command: str
    finished_at: str  # ISO 8601, UTC
    environment: dict[str, Any]
    recipe: dict[str, Any]
    data: dict[str, Any]
    name: str
    optimizations: tuple[str, ...]
    planted: str | None
    claim: str
    summary: str
    why_exact: str
    verdict: Verdict
    losses: tuple[float, ...] = ()
    reference_losses: tuple[float, ...] = ()
    noise_sigma: tuple[float, ...] = ()
    trace: tuple[dict[str, Any], ...] = ()
    census: dict[str, Any] = field(default_factory=dict)
    op: tuple[dict[str, Any], ...] = ()
    autotune: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"record schema {self.schema} is not {SCHEMA}")
        jsonl.moment(self.finished_at)  # raises ValueError for what is no ISO 8601 time

    @property
    def model(self) -> str:
        return str(self.recipe.get("model", ""))

    @property
    def method(self) -> str:
        return str(self.recipe.get("method", ""))

    @property
    def finished(self) -> datetime:
        """When the run finished; a time without a zone is UTC."""
        return jsonl.moment(self.finished_at)


def to_json(record: GateRecord) -> str:
    """One line, keys sorted. Non-finite numbers become strings ("nan", "inf"), since JSON has none."""
    return jsonl.dumps(record)


def from_json(line: str) -> GateRecord:
    """The inverse of `to_json`. Raises one of `abtest.jsonl.DAMAGE` for a line that is no valid record."""
    names = [item.name for item in dataclasses.fields(GateRecord)]
    fields = keys(expect(json.loads(line), dict, "the line"), names, "the record")
    whole(fields["schema"], "schema")
    for name, kind in (dict.fromkeys(TEXT_FIELDS, str) | dict.fromkeys(MAPPINGS, dict)).items():
        expect(fields[name], kind, name)
    if fields["planted"] is not None:
        expect(fields["planted"], str, "planted")
    for name in SERIES:
        fields[name] = series(fields[name], name)
    for name in ("optimizations", "notes"):
        fields[name] = strings(fields[name], name)
    fields["verdict"] = jsonl.verdict(fields["verdict"])
    fields["trace"] = tuple(_trace_row(row) for row in expect(fields["trace"], list, "trace"))
    fields["op"] = tuple(_op_row(row) for row in expect(fields["op"], list, "op"))
    fields["census"] = _census(fields["census"])
    fields["seconds"] = {name: number(value, f"seconds of {name}") for name, value in fields["seconds"].items()}
    return GateRecord(**fields)


def _trace_row(value: Any) -> dict[str, Any]:
    row = keys(expect(value, dict, "a row of trace"), TRACE_KEYS, "a row of trace")
    expect(row["module"], str, "module")
    one_of(row["phase"], ("forward", "backward"), "phase")
    expect(row["same_bits"], bool, "same_bits")
    return row | {name: number(row[name], name) for name in ("relative", "beside")}


def _op_row(value: Any) -> dict[str, Any]:
    row = keys(expect(value, dict, "a row of op"), OP_KEYS, "a row of op", optional=("op",))
    for name in ("op", "workload", "reason"):
        expect(row.get(name, ""), str, name)
    whole(row["seed"], "seed")
    one_of(row["level"], [level.value for level in Level], "level")
    return row


def _census(census: dict[str, Any]) -> dict[str, Any]:
    if not census:
        return {}
    keys(census, CENSUS_KEYS, "census")
    for side in ("reference", "candidate"):
        for name, count in expect(census[side], dict, side).items():
            for inner, value in (count if isinstance(count, dict) else {name: count}).items():
                whole(value, f"the count of {inner}")
    for side in ("new", "gone"):
        strings(census[side], side)
    return census


def path(data_dir: Path, device_slug: str) -> Path:
    return data_dir / "gate" / "runs" / f"{device_slug}.jsonl"


def append_gate(data_dir: Path, device_slug: str, record: GateRecord) -> None:
    """Adds the record to its device's file in a single write, flushed to disk."""
    jsonl.append(path(data_dir, device_slug), to_json(record))


def read(file: Path) -> list[GateRecord]:
    """Every record of a device's file. Raises UserError naming file and line for one that is not valid or not its own."""
    found = jsonl.read(file, from_json)
    for record in found:
        named = record.environment.get("device_slug", file.stem)
        if f"{named}.jsonl" != file.name:
            raise UserError(f"{file}: run {record.run_id!r} is of device {named!r}, which belongs in {named}.jsonl")
    return found


@dataclass(frozen=True)
class Gated:
    """What a page is made of: the newest record of an arm, model and method on a device, and how many older ones it has."""

    slug: str
    record: GateRecord
    older: int

    @property
    def device(self) -> str:
        return str(self.record.environment.get("device") or self.slug)


def load(data_dir: Path) -> list[Gated]:
    """The newest record of every (device, name, model, method), in that order; none where nothing was gated."""
    newest = []
    for file in sorted((data_dir / "gate" / "runs").glob("*.jsonl")):
        groups: dict[tuple[str, str, str], list[GateRecord]] = {}
        for record in sorted(read(file), key=lambda record: record.finished):
            groups.setdefault((record.name, record.model, record.method), []).append(record)
        newest += [Gated(file.stem, groups[group][-1], len(groups[group]) - 1) for group in sorted(groups)]
    return newest
