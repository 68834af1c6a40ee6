"""The oracle's gradients as the gate asks for them: one arm that computes, files that stay, notes on the reference."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from abtest.arm import Arm
from abtest.settings import GateConfig, OnProgress


class Truths:
    """Exact gradients by state and probe. `start` gives a fresh oracle arm; `weights`: each state's file.

    notes: by state, how far the reference's packed path and the recurrence are from the oracle, [error, parameter].
    """

    def __init__(
        self, start: Callable[[], Arm], settings: GateConfig, weights: dict[str, str], on_progress: OnProgress
    ) -> None:
        self.start, self.settings, self.weights, self.on_progress = start, settings, weights, on_progress
        self.paths: dict[tuple[str, int], str] = {}
        self.notes: dict[str, dict[str, Any]] = {state: {} for state in weights}
        self.lock = threading.Lock()
        self.arm: Arm | None = None

    def at(self, state: str) -> dict[str, Any]:
        """What names a state's probes and weights to an arm."""
        return {"state": state, "weights": self.weights[state], "count": self.settings.probes, "seed": self.settings.seed}

    def build(self) -> dict[str, Any]:
        """Starts the oracle and builds its model, which answers as any arm does, before its weights are raised."""
        self.arm = self.start()
        return self.arm.build()

    def end(self) -> None:
        """Ends the oracle's process, which takes much memory; should a file be missing then, it is started for that file."""
        with self.lock:
            self._end()

    def _end(self) -> None:
        self.arm.__exit__(None, None, None)
        self.arm = None

    def prefetch(self, wanted: Iterable[str]) -> None:
        """Works ahead of whoever will ask."""
        for state in wanted:
            for index in range(self.settings.probes):
                self.get(state, index)
                self.on_progress("oracle", state, index + 1, self.settings.probes)

    def get(self, state: str, index: int) -> str:
        """The file with the exact gradients of a probe; made again should the cache have dropped it."""
        path = self.paths.get((state, index))
        if path is not None:
            with suppress(FileNotFoundError):
                os.utime(path)  # still wanted, whoever else needs room
                return path
        with self.lock:
            ended = self.arm is None
            if ended:
                self.build()
            answer = self.arm.call(
                "oracle", **self.at(state), index=index, folder=str(self.settings.oracle_cache.absolute()),
                budget=int(self.settings.oracle_cache_gib * 2**30),
            )  # fmt: skip
            self.paths[state, index] = answer["path"]
            self._note(state, answer["notes"])
            if ended:
                self._end()
        return answer["path"]

    def _note(self, state: str, notes: dict[str, Any]) -> None:
        """Keeps the worst of what was noted about a state's probes."""
        for name, value in notes.items():
            before = self.notes[state].get(name)
            if value is not None and (before is None or not (math.isnan(before[0]) or value[0] <= before[0])):
                self.notes[state][name] = value
