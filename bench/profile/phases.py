"""What a trace says of one phase of a step: time by group and by name, launches, how long the device is busy, the gaps."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.profile import groups
from bench.profile.intervals import Interval, gaps, length, union
from bench.profile.owners import Owners, launchers_of
from bench.profile.trace import Segment, Trace, segments

NAMES = 80  # of kernels that a record keeps, those that take longest; what no pattern knows is kept besides
GAPS = 10  # the longest
PYTHON = "Python, no operator"  # what the host did where it ran neither an operator nor a call
UPDATE = "update"


@dataclass
class Row:
    """One name: its group, the optimization that it belongs to, seconds and how often, of all repetitions."""

    name: str
    group: str
    owner: str | None
    seconds: float = 0.0
    count: int = 0


@dataclass
class Tally:
    """Rows by name and owner."""

    rows: dict[tuple[str, str | None], Row] = field(default_factory=dict)

    def add(self, name: str, owner: str | None, group: str, seconds: float) -> None:
        row = self.rows.setdefault((name, owner), Row(name, group, owner))
        row.seconds += seconds
        row.count += 1

    def result(self, times: int) -> dict[str, Any]:
        """`groups`: seconds by group. `names`: the longest, and all that no group knows. Both of one time out of `times`."""
        by_group: dict[str, float] = defaultdict(float)
        for row in self.rows.values():
            by_group[row.group] += row.seconds / times
        ordered = sorted(self.rows.values(), key=lambda row: (-row.seconds, row.name))
        kept = [row for place, row in enumerate(ordered) if place < NAMES or row.group == groups.OTHER]
        return {
            "groups": {name: by_group[name] for name in groups.WORDS if name in by_group},
            "names": [
                {"name": row.name, "group": row.group, "owner": row.owner, "seconds": row.seconds / times,
                 "count": row.count / times} for row in kept
            ],
        }  # fmt: skip


def shortened(name: str) -> str:
    """A kernel's name without what all of PyTorch's share and what its template repeats; at most 110 characters."""
    name = re.sub(r"^void |at::native::|\(anonymous namespace\)::|\{lambda\([^)]*\)#\d+\}|<unnamed>::", "", name)
    name = re.sub(r"::operator\(\)(\([^)]*\))?( const)?", "", name)
    name = re.sub(r"\s+", " ", name)
    return name if len(name) <= 110 else name[:109] + "…"


def of_device(ranges: Sequence[Trace], phase: str, owners: Owners, per: int) -> dict[str, Any]:
    """Of one phase on a CUDA device; ranges: one trace a repetition, each of `per` micro-steps or updates.

    Times are seconds of one of these: `groups` and `names` of kernels, copies and fills; `busy_s`, in which at least one of
    them runs on any stream; `idle_s`, the rest of the marked range as it was under the profiler, whose host is slower;
    `gaps`, the longest of it in any repetition, with what the host was at; `idle_by`, all of it by that. Counts are of one
    too: device kernels, copies and fills, host calls that launched kernels, and those of them that launched a graph.
    """
    times, tally = len(ranges) * per, Tally()
    busy, counts, idle = 0.0, [0, 0, 0, 0], Idle()
    for trace in ranges:
        launchers = launchers_of(trace)
        for event in trace.device:
            operator = launchers.get(event.external)
            owner = owners.of(event, operator)
            tally.add(shortened(event.name), owner, _group(event.name, owner, phase), event.seconds)
        covered = union((event.begin, event.end) for event in trace.device)
        busy += length(covered)
        counts = [one + other for one, other in zip(counts, _launches(trace), strict=True)]
        (mark,) = trace.marks
        idle.add(trace, gaps(covered, mark.begin, mark.end), mark.begin)
    kernels, copies, launches, graphs = (count / times for count in counts)
    return tally.result(times) | {
        "busy_s": busy / times, "kernels": kernels, "copies": copies, "launches": launches, "graph_launches": graphs,
        **idle.result(times),
    }  # fmt: skip


def _group(name: str, owner: str | None, phase: str) -> str:
    if phase == UPDATE:
        return groups.UPDATE
    found = {groups.of_folder(one) for one in owner.split(" or ")} if owner else set()
    return found.pop() if len(found) == 1 else groups.of_kernel(name)


def _launches(trace: Trace) -> tuple[int, int, int, int]:
    """Kernels, copies and fills, calls that launched kernels, graphs among these. Kernels of one graph share their call."""
    kernels = [event for event in trace.device if event.category == "kernel"]
    graphs = {call.correlation for call in trace.calls if "GraphLaunch" in call.name}
    calls = {event.correlation for event in kernels if event.correlation is not None}
    alone = sum(event.correlation is None for event in kernels)
    return len(kernels), len(trace.device) - len(kernels), len(calls) + alone, len(calls & graphs)


class Idle:
    """Gaps of the device, and what the host was at in each."""

    def __init__(self) -> None:
        self.longest: list[dict[str, Any]] = []
        self.by: dict[str, float] = defaultdict(float)
        self.seconds = 0.0

    def add(self, trace: Trace, found: Iterable[Interval], start: float) -> None:
        """found: the gaps of a repetition, which began at `start`."""
        host = segments((*trace.operators, *trace.calls))
        ends = _reach(host)
        for begin, end in found:
            words = doing(host, ends, begin, end)
            self.seconds += end - begin
            self.by[words] += end - begin
            self.longest.append({"at_s": begin - start, "seconds": end - begin, "host": words})
        self.longest = sorted(self.longest, key=lambda gap: -gap["seconds"])[:GAPS]

    def result(self, times: int) -> dict[str, Any]:
        ordered = sorted(self.by.items(), key=lambda item: (-item[1], item[0]))[:GAPS]
        return {
            "idle_s": self.seconds / times, "gaps": self.longest, "idle_by": {name: s / times for name, s in ordered},
        }  # fmt: skip


def _reach(host: Sequence[Segment]) -> list[float]:
    """For each segment the latest end of any up to it, which never falls, so that it can be searched."""
    found, latest = [], 0.0
    for segment in host:
        latest = max(latest, segment.end)
        found.append(latest)
    return found


def doing(host: Sequence[Segment], reach: Sequence[float], begin: float, end: float) -> str:
    """What took most of the host's time from `begin` to `end`: an operator, a call within one, or neither."""
    spent: dict[str, float] = defaultdict(float)
    for segment in host[bisect_right(reach, begin) :]:
        if segment.begin >= end:
            break
        overlap = min(end, segment.end) - max(begin, segment.begin)
        if overlap > 0:
            spent[_words(segment)] += overlap
    spent[PYTHON] += max(0.0, end - begin - sum(spent.values()))
    return max(spent, key=lambda words: (spent[words], words))


def _words(segment: Segment) -> str:
    own, caller = shortened(segment.event.name), segment.caller
    return f"{own} in {shortened(caller.name)}" if caller and segment.event.category != "cpu_op" else own


def of_host(ranges: Sequence[Trace], phase: str, owners: Owners, per: int) -> dict[str, Any]:
    """Of one phase on a CPU, as `of_device` where it can be: operators by their own time, without that of others inside."""
    times, tally = len(ranges) * per, Tally()
    for trace in ranges:
        own: dict[int, float] = defaultdict(float)
        for segment in segments(trace.operators):
            own[id(segment.event)] += segment.seconds
        for event in trace.operators:
            owner = owners.operators.get(event.name)
            known = groups.of_folder(owner) if owner else groups.of_operator(event.name)
            tally.add(event.name, owner, groups.UPDATE if phase == UPDATE else known, own[id(event)])
    return tally.result(times) | {"busy_s": None}
