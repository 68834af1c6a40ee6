"""Synthetic trials of a search, for the tests of its page: a is taken, then c in its place, then b beside it."""

from __future__ import annotations

from typing import Any

import synthetic_records as synthetic

from bench.search.trials import EXCHANGE, FORWARD, LEAVE_ONE_OUT, Timing, Trial

NAMES = ("a", "b", "c")


def timing(ratio: float, width: float = 0.02, **changes: Any) -> Timing:
    values = {
        "ratio": ratio, "ratio_low": ratio - width, "ratio_high": ratio + width, "blocks": 12, "micro_step_ms": 100 / ratio,
        "against_micro_step_ms": 100.0, "real_tokens_per_s": 1699.4 * ratio,
    }  # fmt: skip
    return Timing(**values | changes)


def trial(stage: str, number: int, against: str, on: str, of: Timing, **changes: Any) -> Trial:
    """Sets are words of one-letter names."""
    values = {
        "run_id": "r", "stage": stage, "round": number, "against": tuple(against), "optimizations": tuple(on), "timing": of,
        "candidates": NAMES, "command": "python -m bench.search", "environment": synthetic.ENVIRONMENT,
        "recipe": synthetic.RECIPE, "finished_at": "2026-01-02T03:04:05+00:00",
    }  # fmt: skip
    return Trial(**values | changes)


def forward() -> list[Trial]:
    """a is taken, then c in its place, then b beside it; nothing else gains."""
    return [
        trial(FORWARD, 1, "", "a", timing(2.0)),
        trial(FORWARD, 1, "", "b", timing(1.5)),
        trial(FORWARD, 2, "a", "ab", Timing(why="b: needs c")),
        trial(EXCHANGE, 2, "a", "c", timing(1.25)),
        trial(FORWARD, 3, "c", "bc", timing(1.6)),
    ]


def whole(without_b: Timing, without_c: Timing) -> list[Trial]:
    left_out = [trial(LEAVE_ONE_OUT, 4, "bc", "c", without_b), trial(LEAVE_ONE_OUT, 4, "bc", "b", without_c)]
    return [*forward(), *left_out]
