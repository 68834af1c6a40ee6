"""Intervals of time, in seconds: what is covered by any of them, and what is left between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Interval = tuple[float, float]  # begin, end


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """What any of them covers, as disjoint intervals in order. Those without length cover nothing."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if end <= begin:
            continue
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    """The sum of their lengths, seconds."""
    return sum(end - begin for begin, end in intervals)


def clipped(intervals: Iterable[Interval], begin: float, end: float) -> list[Interval]:
    """Their parts between `begin` and `end`; what lies outside is left out."""
    parts = [(max(one, begin), min(other, end)) for one, other in intervals]
    return [(one, other) for one, other in parts if other > one]


def gaps(busy: Sequence[Interval], begin: float, end: float) -> list[Interval]:
    """What `busy`, disjoint and in order, leaves open between `begin` and `end`."""
    found, at = [], begin
    for one, other in clipped(busy, begin, end):
        if one > at:
            found.append((at, one))
        at = max(at, other)
    if end > at:
        found.append((at, end))
    return found
