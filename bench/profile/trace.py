"""One trace of torch.profiler: what the host called, what the device ran, and the marked ranges in between.

It is read from the file that the profiler exports for viewers (Chrome's trace event format): its categories are the same in
all versions supported here, its events say which stream ran them and which call launched them, and tests can write one.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
CALLS = ("cuda_runtime", "cuda_driver")
SHAPE = ("grid", "block", "shared memory")  # what tells two kernels of one name apart


@dataclass(frozen=True, slots=True)
class Event:
    """begin, end: seconds from the first event. thread: of the host, or the device's stream. external: the number that an
    operator shares with what it launches, correlation: that of a call; None where there is none."""

    name: str
    category: str
    begin: float
    end: float
    thread: tuple[Any, Any] = ("", "")
    external: int | None = None
    correlation: int | None = None
    shape: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    @property
    def signature(self) -> tuple[str, ...]:
        return (self.name, *self.shape)


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of time in which `event` was what its thread did, and none that it called. caller: the event around it."""

    begin: float
    end: float
    event: Event
    caller: Event | None = None

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True)
class Trace:
    """operators: of PyTorch. calls: of the CUDA runtime and driver. device: kernels, copies and fills. marks: ranges that
    the host marked by name."""

    operators: tuple[Event, ...] = ()
    calls: tuple[Event, ...] = ()
    device: tuple[Event, ...] = ()
    marks: tuple[Event, ...] = ()

    def within(self, mark: Event) -> Trace:
        """What began within a mark."""

        def inside(events: Iterable[Event]) -> tuple[Event, ...]:
            return tuple(event for event in events if mark.begin <= event.begin < mark.end)

        return Trace(inside(self.operators), inside(self.calls), inside(self.device), (mark,))

    def ranges(self, name: str) -> Iterator[Trace]:
        """The part of the trace within each mark of this name."""
        for mark in self.marks:
            if mark.name == name:
                yield self.within(mark)


def parse(document: dict[str, Any]) -> Trace:
    """The trace in an exported file's JSON. A user's annotation as the device saw it is no work of the device."""
    rows = [row for row in document["traceEvents"] if row.get("ph") == "X" and "dur" in row]
    first = min((row["ts"] for row in rows), default=0.0)
    found: dict[str, list[Event]] = defaultdict(list)
    for row in rows:
        category = str(row.get("cat", "")).lower()
        found[category].append(_event(row, category, first))
    return Trace(
        operators=tuple(found["cpu_op"]),
        calls=tuple(event for name in CALLS for event in found[name]),
        device=tuple(event for name in DEVICE for event in found[name]),
        marks=tuple(found["user_annotation"]),
    )


def _event(row: dict[str, Any], category: str, first: float) -> Event:
    arguments = row.get("args") or {}
    begin = row["ts"] - first
    return Event(
        name=str(row["name"]),
        category=category,
        begin=_seconds(begin),
        end=_seconds(begin + max(row["dur"], 0)),
        thread=(row.get("pid"), row.get("tid")),
        external=arguments.get("External id"),
        correlation=arguments.get("correlation"),
        shape=tuple(str(arguments[key]) for key in SHAPE if key in arguments),
    )


def _seconds(microseconds: float) -> float:
    """To the nanosecond, as they were taken: what touches then has no gap between."""
    return round(1e3 * microseconds) / 1e9


def capture(work: Callable[[], None], cuda: bool) -> Trace:
    """Runs `work` under torch.profiler. What it marks with `torch.profiler.record_function` becomes the trace's marks."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities) as profiler:
        work()
    with tempfile.TemporaryDirectory(prefix="isoloss-") as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        with path.open(encoding="utf-8", errors="replace") as file:
            return parse(json.load(file, strict=False))  # names of kernels may hold control characters


def segments(events: Iterable[Event]) -> list[Segment]:
    """What every thread was at, innermost event first, in order of time. Each thread's are disjoint."""
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        threads[event.thread].append(event)
    found = [segment for own in threads.values() for segment in _of_thread(own)]
    return sorted(found, key=lambda segment: (segment.begin, segment.end))


def _of_thread(events: list[Event]) -> Iterator[Segment]:
    stack: list[Event] = []
    at = 0.0

    def until(time: float) -> Iterator[Segment]:
        nonlocal at
        if stack and time > at:
            yield Segment(at, time, stack[-1], stack[-2] if len(stack) > 1 else None)
        at = max(at, time)

    for event in sorted(events, key=lambda event: (event.begin, -event.end)):
        while stack and stack[-1].end <= event.begin:
            yield from until(stack[-1].end)
            stack.pop()
        yield from until(event.begin)
        stack.append(event)
    while stack:
        yield from until(stack[-1].end)
        stack.pop()
