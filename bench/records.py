"""The truth behind every report: one JSON line an arm, only ever appended.

A record cannot hold a time unless its gate passed: constructing one that does raises ValueError, and so does reading one. A
peer's alone may, since nobody ships it: what a user could pick instead is as fast as it is, also where it leaks between
documents, and what leaks has to be beaten all the same. Its verdict stands beside the time wherever that is shown.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from abtest import jsonl
from abtest.jsonl import expect, numbers, strings
from abtest.verdict import Level, Verdict
from loop.errors import UserError

D = TypeVar("D")
SCHEMA = 1
TEXT_FIELDS = ("run_id", "arm", "role", "summary", "exactness", "why_exact", "command", "finished_at")
MAPPINGS = ("environment", "recipe", "data")
# "repeat" is the reference again, in a process of its own: how far from 1 the ratio of equal arms comes out here.
# "negative": an optimization of negative_results/, measured as any other, in no combination and never shipped
Role = Literal["reference", "repeat", "optimization", "negative", "combination", "peer"]


@dataclass(frozen=True)
class Perf:
    """Speed of one arm, timed in turn with the reference in one run.

    The three throughputs are medians, per second. ratio is the reference's time over this arm's (above 1 is faster), the
    median of the paired blocks; ratio_low and ratio_high bound its 95 % interval. micro_step_ms is the median time of
    one micro-step. mfu is model FLOPs over the measured matrix rate, None where none was measured. update_ms is the median
    time of an update of the weights, which no other number here holds; update_ratio is the reference's over it, as ratio is.
    Peers have none, since their updates are the loop's, nor have older records. update_in_step: it was timed behind a
    micro-step, as a step has it; where not, by itself, so that on a GPU it is what the host takes to launch it.
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
    update_ms: float | None = None
    update_ratio: float | None = None
    update_ratio_low: float | None = None
    update_ratio_high: float | None = None
    update_in_step: bool = False


@dataclass(frozen=True)
class Race:
    """A peer timed in turn with the arm that was the fastest of those that had passed in its run; optimizations: that one's.
    ratio: the peer's time over that arm's (above 1: the peer is slower), the median of the paired blocks, and its 95 %
    interval. peer_ms, own_ms: the median micro-step of either in these turns; older records lack them."""

    arm: str
    optimizations: tuple[str, ...]
    ratio: float
    ratio_low: float
    ratio_high: float
    blocks: int
    peer_ms: float | None = None
    own_ms: float | None = None


@dataclass(frozen=True)
class Record:
    """One arm of one run of `python -m bench.run`.

    optimizations: the names switched on. losses: per-step loss, fp32, of this arm; reference_losses: of the reference.
    untimed: why there is no `perf` although the gate passed (Triton's interpreter is not timed, say). race: of a timed peer,
    beside what had passed by then; ratios to stock drift apart, since a busy host slows what it launches by itself most.
    environment: device, device_slug, driver, clocks, versions, git_sha, git_dirty, paths (which implementation ran); of a
    peer also peer: the versions of its packages, the path that it took, and the device kernels that ran.
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
    race: Race | None = None
    untimed: str | None = None
    micro: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    schema: int = field(default=SCHEMA)

    def __post_init__(self) -> None:
        if self.perf is not None and not may_hold_time(self.role, self.verdict.level):
            raise ValueError(f"arm {self.arm!r} is {self.verdict.level.value}: what did not pass its gate holds no time")
        if self.perf is not None and self.untimed is not None:
            raise ValueError(f"arm {self.arm!r} has both a time and a reason for having none")
        if self.race is not None and (self.role != "peer" or self.perf is None):
            raise ValueError(f"arm {self.arm!r} holds a race, which only a timed peer can have run")
        if self.verdict.level.lossless and any(not check.passed for check in self.verdict.checks):
            raise ValueError(f"arm {self.arm!r} is {self.verdict.level.value} with a check that did not pass")
        if self.schema != SCHEMA:
            raise ValueError(f"record schema {self.schema} is not {SCHEMA}")


def may_hold_time(role: Role, level: Level) -> bool:
    """Whether an arm that the gate gave this level may be timed: what is lossless, and a peer that ran at all."""
    return level.lossless or (role == "peer" and level is not Level.NOT_RUN)


@contextmanager
def writing_to(reports: Path) -> Iterator[None]:
    """Raises UserError where the folder of reports, or a file in it, can't be read or written inside."""
    try:
        yield
    except OSError as error:
        why = f"{error.filename}: {error.strerror}"
        raise UserError(f"--reports {reports}: {why}; a folder to write to is expected") from error


def to_json(record: Record) -> str:
    """One line, keys sorted. Non-finite numbers become strings ("nan", "inf"), since JSON has none."""
    return jsonl.dumps(record)


def from_json(line: str) -> Record:
    """The inverse of `to_json`. Raises for a line that is no valid record: ValueError, TypeError, KeyError, OverflowError
    (an integer that no float holds) or RecursionError (nested too deep)."""
    fields = expect(json.loads(line), dict, "the line")
    for name, kind in (dict.fromkeys(TEXT_FIELDS, str) | dict.fromkeys(MAPPINGS, dict)).items():
        expect(fields[name], kind, name)
    for name, kind in (("untimed", str), ("micro", dict)):
        if fields.get(name) is not None:
            expect(fields[name], kind, name)
    if fields["role"] not in get_args(Role):
        raise ValueError(f"role is {fields['role']!r}, not one of {', '.join(get_args(Role))}")
    verdict = jsonl.verdict(fields.pop("verdict"))
    perf, race = fields.pop("perf", None), fields.pop("race", None)
    for name in ("losses", "reference_losses", "noise_sigma"):
        fields[name] = tuple(float(value) for value in fields.get(name, ()))
    return Record(
        verdict=verdict,
        perf=None if perf is None else _perf(expect(perf, dict, "perf")),
        race=None if race is None else _race(expect(race, dict, "race")),
        optimizations=strings(fields.pop("optimizations"), "optimizations"),
        notes=strings(fields.pop("notes", []), "notes"),
        **fields,
    )


def _perf(fields: dict[str, Any]) -> Perf:
    in_step = expect(fields.pop("update_in_step", False), bool, "update_in_step")
    return _whole(Perf(**numbers(fields, tuple(fields)), update_in_step=in_step), "perf")


def _whole(made: D, name: str) -> D:
    """`made`, if it holds a number wherever it must. Raises ValueError."""
    for item in dataclasses.fields(made):
        if item.default is dataclasses.MISSING and getattr(made, item.name) is None:
            raise ValueError(f"{item.name} of {name} is null, not a number")
    return made


def _race(fields: dict[str, Any]) -> Race:
    arm, switched = expect(fields.pop("arm"), str, "arm of race"), strings(fields.pop("optimizations"), "those of race")
    return _whole(Race(arm, switched, **numbers(fields, tuple(fields))), "race")


def append(path: Path, record: Record) -> None:
    """Adds one line in a single write and flushes it to disk, so a crash loses at most the line in flight."""
    jsonl.append(path, to_json(record))


def read(path: Path) -> list[Record]:
    """Every record of a file, in order. Raises UserError naming file and line for one that is not a valid record."""
    return jsonl.read(path, from_json)
