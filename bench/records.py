"""The truth behind every report: one JSON line an arm, only ever appended.

A record cannot hold a time unless its gate passed: constructing one that does raises ValueError, and so does reading one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from abtest.verdict import Check, Level, Verdict
from loop.errors import UserError

SCHEMA = 1
TEXT_FIELDS = ("run_id", "arm", "role", "summary", "exactness", "why_exact", "command", "finished_at")
MAPPINGS = ("environment", "recipe", "data")
JSON_NAMES = {dict: "an object", list: "an array", str: "a string", bool: "true or false"}
# "repeat" is the reference again, in a process of its own: how far from 1 the ratio of equal arms comes out here
Role = Literal["reference", "repeat", "optimization", "combination", "peer"]


@dataclass(frozen=True)
class Perf:
    """Speed of one arm, timed in turn with the reference in one run.

    The three throughputs are medians, per second. ratio is the reference's time over this arm's (above 1 is faster), the
    median of the paired blocks; ratio_low and ratio_high bound its 95 % interval. micro_step_ms is the median time of
    one micro-step. mfu is model FLOPs over the measured matrix rate, None where none was measured.
    """

    positions_per_s: float
    real_tokens_per_s: float
    supervised_tokens_per_s: float
    micro_step_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    blocks: int
    peak_memory_bytes: int | None = None
    mfu: float | None = None
    launches: int | None = None  # device kernels a micro-step


@dataclass(frozen=True)
class Record:
    """One arm of one run of `python -m bench.run`.

    optimizations: the names switched on. losses: per-step loss, fp32, of this arm; reference_losses: of the reference.
    untimed: why there is no `perf` although the gate passed (Triton's interpreter is not timed, say).
    environment: device, device_slug, driver, clocks, versions, git_sha, git_dirty, paths (which implementation ran).
    recipe: the run's configuration. data: documents, packs, skipped examples by reason, supervised fraction.
    """

    run_id: str
    arm: str
    role: Role
    optimizations: tuple[str, ...]
    verdict: Verdict
    summary: str
    exactness: str
    why_exact: str
    environment: dict[str, Any]
    recipe: dict[str, Any]
    data: dict[str, Any]
    command: str
    finished_at: str  # ISO 8601, UTC
    losses: tuple[float, ...] = ()
    reference_losses: tuple[float, ...] = ()
    noise_sigma: tuple[float, ...] = ()  # per step: standard deviation of the loss over perturbed references
    perf: Perf | None = None
    untimed: str | None = None
    micro: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    schema: int = field(default=SCHEMA)

    def __post_init__(self) -> None:
        if self.perf is not None and not self.verdict.level.lossless:
            raise ValueError(f"arm {self.arm!r} is {self.verdict.level.value}: what did not pass its gate holds no time")
        if self.perf is not None and self.untimed is not None:
            raise ValueError(f"arm {self.arm!r} has both a time and a reason for having none")
        if self.verdict.level.lossless and any(not check.passed for check in self.verdict.checks):
            raise ValueError(f"arm {self.arm!r} is {self.verdict.level.value} with a check that did not pass")
        if self.schema != SCHEMA:
            raise ValueError(f"record schema {self.schema} is not {SCHEMA}")


def to_json(record: Record) -> str:
    """One line, keys sorted. Non-finite numbers become strings ("nan", "inf"), since JSON has none."""
    return json.dumps(_plain(dataclasses.asdict(record)), sort_keys=True, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Level):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def from_json(line: str) -> Record:
    """The inverse of `to_json`. Raises for a line that is no valid record: ValueError, TypeError, KeyError, OverflowError
    (an integer that no float holds) or RecursionError (nested too deep)."""
    fields = _expect(json.loads(line), dict, "the line")
    for name, kind in (dict.fromkeys(TEXT_FIELDS, str) | dict.fromkeys(MAPPINGS, dict)).items():
        _expect(fields[name], kind, name)
    for name, kind in (("untimed", str), ("micro", dict)):
        if fields.get(name) is not None:
            _expect(fields[name], kind, name)
    if fields["role"] not in get_args(Role):
        raise ValueError(f"role is {fields['role']!r}, not one of {', '.join(get_args(Role))}")
    verdict = _expect(fields.pop("verdict"), dict, "verdict")
    checks = tuple(_check(check) for check in _expect(verdict["checks"], list, "checks"))
    perf = fields.pop("perf", None)
    for name in ("losses", "reference_losses", "noise_sigma"):
        fields[name] = tuple(float(value) for value in fields.get(name, ()))
    return Record(
        verdict=Verdict(Level(verdict["level"]), _expect(verdict["reason"], str, "reason"), checks),
        perf=None if perf is None else _perf(_expect(perf, dict, "perf")),
        optimizations=_strings(fields.pop("optimizations"), "optimizations"),
        notes=_strings(fields.pop("notes", []), "notes"),
        **fields,
    )


def _check(fields: Any) -> Check:
    check = Check(**_numbers(_expect(fields, dict, "a check"), ("value", "limit")))
    for name, kind in (("name", str), ("passed", bool), ("detail", str)):
        _expect(getattr(check, name), kind, f"a check's {name}")
    return check


def _perf(fields: dict[str, Any]) -> Perf:
    perf = Perf(**_numbers(fields, tuple(fields)))
    for item in dataclasses.fields(Perf):
        if item.default is dataclasses.MISSING and getattr(perf, item.name) is None:
            raise ValueError(f"{item.name} of perf is null, not a number")
    return perf


def _strings(value: Any, what: str) -> tuple[str, ...]:
    return tuple(_expect(item, str, f"one of {what}") for item in _expect(value, list, what))


def _expect(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{what} is {value!r:.60}, not {JSON_NAMES[kind]}")
    return value


def _numbers(fields: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The strings that `to_json` wrote for non-finite numbers become numbers again; integers stay integers."""
    fields = {key: float(value) if key in names and isinstance(value, str) else value for key, value in fields.items()}
    for key in names:
        if fields.get(key) is not None and type(fields[key]) not in (int, float):
            raise ValueError(f"{key} is {fields[key]!r:.60}, not a number")
        float(fields.get(key) or 0)  # an integer beyond what a float holds raises OverflowError here
    return fields


def append(path: Path, record: Record) -> None:
    """Adds one line in a single write and flushes it to disk, so a crash loses at most the line in flight."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = to_json(record) + "\n"
    if path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size:
        line = "\n" + line  # a torn last line stays one bad line and does not swallow this one
    with path.open("a", encoding="utf-8") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Record]:
    """Every record of a file, in order. Raises UserError naming file and line for one that is not a valid record."""
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):  # str.splitlines would also split inside strings
        if not line.strip():
            continue
        try:
            records.append(from_json(line.decode("utf-8")))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            why = f"no key {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{path}:{number}: not a valid record: {why}") from error
    return records
