"""The raw outcome of `python -m abtest.sensitivity`: one JSON line a case, and what the run was in a file beside it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abtest import jsonl
from abtest.jsonl import expect, keys, number, one_of, strings, whole
from abtest.verdict import Level
from loop.errors import UserError
from loop.files import write_text

SPLITS = ("calibration", "holdout")
FACTS = ("run_id", "command", "environment", "recipe", "limits", "started", "finished", "seconds")


@dataclass(frozen=True)
class SensitivityLine:
    """One planted defect or honest rewrite through the gate.

    layer: where it stood; magnitude: how strong, in `unit`; equivalent: it changed no bit. caught_by: the checks that
    failed. modelled_on: the real bug behind it. values: the worst value over states of every check that has a limit.
    """

    kind: str
    name: str
    family: str
    layer: str
    magnitude: float
    seed: int
    equivalent: bool
    caught: bool
    caught_by: tuple[str, ...]
    split: str
    method: str
    level: str
    reason: str
    modelled_on: str
    unit: str
    values: dict[str, float]


@dataclass(frozen=True)
class SweepLine:
    """One scale error of one projection: whether it was caught. scale: relative, 0.001 is a thousandth."""

    where: str
    method: str
    scale: float
    caught: bool
    caught_by: tuple[str, ...]
    seed: int = 0


@dataclass(frozen=True)
class Sensitivity:
    """All that is known of one device: its cases, its sweep of scale errors, and the run they come from."""

    slug: str
    lines: tuple[SensitivityLine, ...]
    sweep: tuple[SweepLine, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> str:
        return str(self.facts.get("environment", {}).get("device") or self.slug)


def line_of(value: Any) -> SensitivityLine:
    """Raises one of `abtest.jsonl.DAMAGE` for what is no outcome of a case."""
    names = [item.name for item in dataclasses.fields(SensitivityLine)]
    row = keys(expect(value, dict, "the line"), names, "the line")
    for name in ("name", "family", "layer", "reason", "modelled_on", "unit"):
        expect(row[name], str, name)
    for name in ("equivalent", "caught"):
        expect(row[name], bool, name)
    one_of(row["kind"], ("mutant", "benign"), "kind")
    one_of(row["split"], SPLITS, "split")
    one_of(row["method"], ("lora", "full"), "method")
    one_of(row["level"], [level.value for level in Level], "level")
    values = {check: number(item, check) for check, item in expect(row["values"], dict, "values").items()}
    own = {"magnitude": number(row["magnitude"], "magnitude"), "seed": whole(row["seed"], "seed"), "values": values}
    return SensitivityLine(**(row | own | {"caught_by": strings(row["caught_by"], "caught_by")}))


def sweep_of(value: Any) -> SweepLine:
    """Raises one of `abtest.jsonl.DAMAGE` for what is no outcome of a scale error."""
    names = [item.name for item in dataclasses.fields(SweepLine) if item.name != "seed"]
    row = keys(expect(value, dict, "the line"), names, "the line", optional=("seed",))
    expect(row["where"], str, "where")
    one_of(row["method"], ("lora", "full"), "method")
    expect(row["caught"], bool, "caught")
    whole(row.get("seed", 0), "seed")
    own = {"scale": number(row["scale"], "scale"), "caught_by": strings(row["caught_by"], "caught_by")}
    return SweepLine(**(row | own))


def facts_of(value: Any) -> dict[str, Any]:
    """The facts of a run: an object with at least `FACTS`. Raises one of `abtest.jsonl.DAMAGE`."""
    facts = expect(value, dict, "the line")
    for name in FACTS:
        facts[name]  # a KeyError names it
    for name in ("environment", "recipe", "limits"):
        expect(facts[name], dict, name)
    for name in ("run_id", "command", "started", "finished"):
        expect(facts[name], str, name)
    limits = {name: number(limit, f"the limit of {name}") for name, limit in facts["limits"].items()}
    return facts | {"limits": limits, "seconds": number(facts["seconds"], "seconds")}


def write_sensitivity(
    data_dir: Path, device_slug: str, lines: Sequence[Any], facts: dict[str, Any], sweep: Sequence[Any]
) -> None:
    """Replaces a device's outcome by that of one run: each of its three files whole, or not at all.

    lines, sweep: dictionaries, or `SensitivityLine`s and `SweepLine`s. Raises ValueError, TypeError or KeyError for one that
    could not be read again; nothing is written then.
    """
    content = {
        f"{device_slug}.sweep.jsonl": _checked(sweep, sweep_of),
        f"{device_slug}.facts.json": _checked([facts], facts_of),
        f"{device_slug}.jsonl": _checked(lines, line_of),
    }
    for name, text in content.items():
        write_text(data_dir / "gate" / name, text)


def _checked(values: Sequence[Any], parse: Any) -> str:
    written = [jsonl.dumps(value) for value in values]
    for line in written:
        parse(json.loads(line))
    return "".join(line + "\n" for line in written)


def load(data_dir: Path) -> list[Sensitivity]:
    """Every device that has an outcome, ordered by slug. Raises UserError naming file and line for what is not valid."""
    folder = data_dir / "gate"
    found = []
    for file in sorted(folder.glob("*.jsonl")):
        if file.name.endswith(".sweep.jsonl"):
            continue
        slug = file.name.removesuffix(".jsonl")
        lines = jsonl.read(file, lambda line: line_of(json.loads(line)))
        if lines:
            found.append(Sensitivity(slug, tuple(lines), _sweep(folder, slug), _facts(folder, slug)))
    return found


def _sweep(folder: Path, slug: str) -> tuple[SweepLine, ...]:
    file = folder / f"{slug}.sweep.jsonl"
    return tuple(jsonl.read(file, lambda line: sweep_of(json.loads(line)))) if file.is_file() else ()


def _facts(folder: Path, slug: str) -> dict[str, Any]:
    """Empty where the outcome came without them."""
    file = folder / f"{slug}.facts.json"
    if not file.is_file():
        return {}
    found = jsonl.read(file, lambda line: facts_of(json.loads(line)))
    if len(found) != 1:
        raise UserError(f"{file}: {len(found)} lines; one JSON object in one line is expected")
    facts = found[0]
    named = facts["environment"].get("device_slug", slug)
    if named != slug:
        raise UserError(f"{file}: the run is of device {named!r}, which belongs in {named}.facts.json")
    return facts
