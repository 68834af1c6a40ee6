"""The raw outcome of `python -m bench.cross_compile`: a JSON line for every kernel's case and target.

A line holds what was measured and what was allowed; whether it passes is computed from the two and stored nowhere. No line
holds a time or a machine's name, so compiling the same commit with the same compilers gives the same file.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abtest import jsonl
from abtest.jsonl import expect, keys, one_of, whole
from kernels.cross_compile import CODES, TARGETS
from loop.files import write_text

LIMITS = ("registers", "spill_bytes", "shared_bytes", "narrow_accesses")
MEASURED = (*LIMITS, "accesses")
WORDS = {
    "registers": "registers a thread",
    "spill_bytes": "bytes of stack and local memory a thread",
    "shared_bytes": "bytes of shared memory a block",
    "narrow_accesses": "loads and stores of less than 16 bytes a thread",
}


@dataclass(frozen=True)
class Count:
    """How many lines of a kernel's code hold an instruction, and how many may. most: None where any number may."""

    name: str
    code: str
    pattern: str
    found: int
    least: int
    most: int | None

    @property
    def passed(self) -> bool:
        return self.least <= self.found and (self.most is None or self.found <= self.most)

    @property
    def allowed(self) -> str:
        if self.most is None:
            return f"at least {self.least}"
        if self.most == 0:
            return "none"
        return f"exactly {self.most}" if self.least == self.most else f"{self.least} to {self.most}"


@dataclass(frozen=True)
class Outcome:
    """One case of one kernel, compiled for one target.

    kernel: module and function, or file and function. launch: the arguments' types and values and the options that it was
    compiled for. limits: at most so many of `LIMITS`, None where any number may be. measured: `MEASURED`, or None where
    there is no code: `error` then says why it does not compile, `skipped` why nobody tried. compiled_for: the target that
    the PTX names. compilers: name and version. git_dirty: None where there is no git.
    """

    optimization: str
    kernel: str
    case: str
    target: str
    launch: dict[str, str]
    limits: dict[str, int | None]
    measured: dict[str, int] | None = None
    instructions: tuple[Count, ...] = ()
    compiled_for: str | None = None
    compilers: dict[str, str] = dataclasses.field(default_factory=dict)
    error: str | None = None
    skipped: str | None = None
    git_sha: str | None = None
    git_dirty: bool | None = None

    @property
    def passed(self) -> bool:
        return self.measured is not None and not self.faults

    @property
    def faults(self) -> tuple[str, ...]:
        """In words, everything that is not as expected; nothing is said of a case that nobody tried to compile."""
        if self.measured is None:
            return (f"does not compile: {self.error}",) if self.error is not None else ()
        found = [] if self.compiled_for == self.target else [f"the code is for {self.compiled_for}"]
        for name in LIMITS:
            limit = self.limits[name]
            if limit is not None and self.measured[name] > limit:
                found.append(f"{self.measured[name]:,} {WORDS[name]}, more than {limit:,}")
        if self.limits["narrow_accesses"] is not None and not self.measured["accesses"]:
            found.append("no load or store of global memory was found")
        counts = [count for count in self.instructions if not count.passed]
        return (*found, *(f"{count.name} {count.found} times, not {count.allowed}" for count in counts))


def order(outcome: Outcome) -> tuple[Any, ...]:
    """The order of the file and of the report."""
    return outcome.optimization, outcome.kernel, outcome.case, TARGETS.index(outcome.target)


def path(data_dir: Path) -> Path:
    return data_dir / "cross_compile" / "records.jsonl"


def write(data_dir: Path, outcomes: Sequence[Outcome]) -> Path:
    """Replaces the record by `outcomes`, whole or not at all. Raises one of `abtest.jsonl.DAMAGE` for what can't be read."""
    lines = [jsonl.dumps(outcome) for outcome in sorted(outcomes, key=order)]
    for line in lines:
        parse(line)
    write_text(path(data_dir), "".join(line + "\n" for line in lines))
    return path(data_dir)


def load(data_dir: Path) -> list[Outcome]:
    """Every line, in order; none where there is no record. Raises UserError naming file and line for what is not valid."""
    file = path(data_dir)
    return sorted(jsonl.read(file, parse), key=order) if file.is_file() else []


def parse(line: str) -> Outcome:
    """Raises one of `abtest.jsonl.DAMAGE` for what is no outcome."""
    outcome = parse_planned(line)
    if [outcome.measured, outcome.error, outcome.skipped].count(None) != 2:
        raise ValueError("one of measured, error and skipped is expected, and the others null")
    return outcome


def parse_planned(line: str) -> Outcome:
    """The same for an outcome that may still lack its result."""
    row = keys(expect(json.loads(line), dict, "the line"), [field.name for field in dataclasses.fields(Outcome)], "the line")
    for name in ("optimization", "kernel", "case"):
        expect(row[name], str, name)
    for name, kind in (("compiled_for", str), ("error", str), ("skipped", str), ("git_sha", str), ("git_dirty", bool)):
        if row[name] is not None:
            expect(row[name], kind, name)
    one_of(row["target"], TARGETS, "target")
    for name in ("launch", "compilers"):
        for key, value in expect(row[name], dict, name).items():
            expect(value, str, f"{name}: {key}")
    limits = keys(expect(row["limits"], dict, "limits"), LIMITS, "limits")
    for name, limit in limits.items():
        if limit is not None:
            whole(limit, name)
    if row["measured"] is not None:
        for name, value in keys(expect(row["measured"], dict, "measured"), MEASURED, "measured").items():
            whole(value, name)
    counts = tuple(_count(item) for item in expect(row["instructions"], list, "instructions"))
    return Outcome(**(row | {"instructions": counts}))


def _count(value: Any) -> Count:
    names = [field.name for field in dataclasses.fields(Count)]
    row = keys(expect(value, dict, "an instruction"), names, "an instruction")
    for name in ("name", "pattern"):
        expect(row[name], str, name)
    one_of(row["code"], CODES, "code")
    for name in ("found", "least"):
        whole(row[name], name)
    if row["most"] is not None:
        whole(row["most"], "most")
    return Count(**row)
