"""How much a count says: exact (Clopper-Pearson) limits of a proportion, C. Clopper and E. Pearson, Biometrika 26, 1934."""

from __future__ import annotations

import math

CONFIDENCE = 0.95


def interval(hits: int, cases: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Two-sided limits of the proportion behind `hits` of `cases`; (0, 1) where there are no cases."""
    if not 0 <= hits <= cases:
        raise ValueError(f"{hits} of {cases} is no proportion")
    tail = (1 - confidence) / 2
    if cases == 0:
        return 0.0, 1.0
    low = 0.0 if hits == 0 else _solve(lambda p: 1 - _at_most(hits - 1, cases, p), tail)
    high = 1.0 if hits == cases else _solve(lambda p: 1 - _at_most(hits, cases, p), 1 - tail)
    return low, high


def at_most(hits: int, cases: int, confidence: float = CONFIDENCE) -> float:
    """The one-sided upper limit: for no hits it is close to 3 / cases, the rule of three."""
    return interval(hits, cases, 2 * confidence - 1)[1]


def _at_most(hits: int, cases: int, p: float) -> float:
    """Probability of at most `hits` in `cases` tries of probability p, 0 < p < 1."""
    logs = [
        math.lgamma(cases + 1)
        - math.lgamma(k + 1)
        - math.lgamma(cases - k + 1)
        + k * math.log(p)
        + (cases - k) * math.log1p(-p)
        for k in range(hits + 1)
    ]
    return min(1.0, math.fsum(map(math.exp, logs)))


def _solve(rising, wanted: float) -> float:
    """Where a function that rises over (0, 1) takes the value `wanted`."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return (low + high) / 2
