"""Greedy forward, then leave one out: which sets are compared, and what follows from it. No clock, no process in here.

Forward: what is not in the best set so far is added to it, each in a set of its own; a set that is faster by its whole
interval becomes the best. Those that gained most when they were last tried come first, and the first batch with a clear
winner decides, as in accelerated greedy search (Minoux 1978, "Accelerated greedy algorithms for maximizing submodular set
functions"). When nothing that can be added gains, what conflicts with a member is tried in its place, and everything at
once, which finds what pays only in company. It stops when none of these is clearly faster.

Backward: each member of the best set is left out. Who is not missed goes, one at a time, since of two that do the same work
neither is missed while the other is there.

A search begins with stock, or with a set that it is given. That one is compared with the sets around it, not with stock nor
with what would be tried on the way from there: the answer may be another one than from stock, and slower. Wherever it began,
nothing more is added once a member was left out.

What works in the update alone is not in the micro-step that is timed, so time can't say whether it pays: it is on from the
beginning, unless it conflicts with what is, and nobody leaves it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from bench.search.candidates import Candidate
from bench.search.trials import EXCHANGE, FORWARD, LEAVE_ONE_OUT, Set, Trial


class OutOfTime(Exception):
    """No trial may begin any more."""


class Clock(Protocol):
    """Compares sets. What it holds of the best set's process, or of a batch's, is its own business."""

    def measure(self, stage: str, number: int, against: Set, sets: Sequence[Set]) -> list[Trial]:
        """Each of `sets` beside `against`, all of them in turn. Raises OutOfTime."""

    def take(self, chosen: Set) -> None:
        """`chosen`, measured just now, is the best set from here on."""

    def renew(self) -> None:
        """What follows is to be compared with the best set in a fresh process."""


@dataclass(frozen=True)
class Answer:
    """optimizations: the fastest set, () where that is stock. finished: whether the search came to its end.
    left_out: the last comparison of the set without each of its members."""

    optimizations: Set
    finished: bool
    left_out: tuple[Trial, ...] = ()


class Search:
    """One search. conflict(one, other): whether two can't be on together. width: sets that are compared at a time. begin:
    candidates that are on when it begins, without conflicts."""

    def __init__(
        self, candidates: Sequence[Candidate], conflict: Callable[[str, str], bool], clock: Clock, width: int = 4,
        begin: Iterable[str] = (),
    ) -> None:  # fmt: skip
        self.gains = {one.name: one.ratio for one in candidates if one.timed}  # what each did when it was last tried
        self.untimed = [one.name for one in candidates if not one.timed]
        self.conflict, self.clock, self.width = conflict, clock, width
        self.best: Set = self._around((*begin, *self.untimed))
        self.been = {self.best}
        self.round = 0
        self.left_out: list[Trial] = []

    def run(self) -> Answer:
        """The answer, or what is best so far when the clock says that the time is over."""
        try:
            self._forward()
            self._backward()
        except OutOfTime:
            return Answer(self._answer(), False)
        return Answer(self._answer(), True, tuple(self.left_out))

    def _answer(self) -> Set:
        return self.best if any(name in self.gains for name in self.best) else ()

    def _take(self, chosen: Set) -> None:
        self.best = chosen
        self.been.add(chosen)
        self.clock.take(chosen)

    # Forward

    def _forward(self) -> None:
        while self._additions() or self._exchanges():
            self.round += 1
            added = self._additions()
            winner = self._winner(FORWARD, added)
            if winner is None:
                winner = self._winner(EXCHANGE, [one for one in self._exchanges() if one not in added])
            if winner is None:
                return
            self._take(winner)

    def _winner(self, stage: str, sets: Sequence[Set]) -> Set | None:
        for batch in _batches(sets, self.width):
            trials = self.clock.measure(stage, self.round, self.best, batch)
            for trial in trials:
                if stage == FORWARD:
                    self.gains[trial.added[0]] = trial.timing.ratio or 0.0  # what does not run here comes last
            faster = [trial for trial in trials if trial.faster]
            if faster:
                return max(faster, key=lambda trial: trial.timing.ratio).optimizations
        return None

    def _others(self) -> list[str]:
        """Who is not in the best set, likeliest first."""
        return sorted((name for name in self.gains if name not in self.best), key=lambda name: -self.gains[name])

    def _additions(self) -> list[Set]:
        sets = [_set((*self.best, name)) for name in self._others() if self._fits(name, self.best)]
        return [one for one in sets if one not in self.been]

    def _exchanges(self) -> list[Set]:
        """For everyone whom a member keeps out, the set around it: with whoever of the best set may stay, and with all else
        that gained when it was last tried. And everybody, as far as they don't conflict."""
        others = self._others()
        gained = [name for name in others if self.gains[name] > 1]
        out = [name for name in others if not self._fits(name, self.best)]
        sets = [self._around((name, *self.best, *gained)) for name in out]
        sets.append(self._around((*self.best, *others)))
        sets.append(self._around((*sorted(self.gains, key=lambda name: -self.gains[name]), *self.untimed)))
        return [one for one in dict.fromkeys(sets) if one not in self.been]

    def _around(self, names: Iterable[str]) -> Set:
        kept: list[str] = []
        for name in names:
            if name not in kept and self._fits(name, kept):
                kept.append(name)
        return _set(kept)

    def _fits(self, name: str, members: Iterable[str]) -> bool:
        return not any(self.conflict(name, member) for member in members)

    # Backward

    def _backward(self) -> None:
        self.clock.renew()  # the best set's process may have won because it is a lucky one
        while self._answer():
            self.round += 1
            members = [name for name in self.best if name in self.gains]
            sets = [tuple(name for name in self.best if name != left) for left in members]
            self.left_out = []
            for batch in _batches(sets, self.width):
                self.left_out += self.clock.measure(LEAVE_ONE_OUT, self.round, self.best, batch)
            unneeded = [trial for trial in self.left_out if not trial.needed]
            if not unneeded:
                return
            self._take(min(unneeded, key=lambda trial: trial.gain[0]).optimizations)
        self.left_out = []


def _set(names: Iterable[str]) -> Set:
    return tuple(sorted(names))


def _batches(sets: Sequence[Set], width: int) -> Iterable[Sequence[Set]]:
    for start in range(0, len(sets), width):
        yield sets[start : start + width]
