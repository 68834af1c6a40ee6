"""What a record says, in words and markdown. The escapes, tables and units behind it are `abtest.markdown`'s."""

from __future__ import annotations

import math

from abtest import markdown
from abtest.markdown import (
    MARK,
    NOTHING,
    RESERVED,
    code,
    facts,
    link,
    memory,
    names,
    number,
    one_line,
    page_name,
    per_second,
    percent,
    prose,
    scalar,
    shell,
    table,
)
from bench.records import Perf, Record

__all__ = [
    "MARK", "NOTHING", "RESERVED", "code", "dtype", "facts", "launches_saved", "link", "memory", "names", "number",
    "one_line", "page_name", "per_second", "percent", "prose", "ratio", "scalar", "setting_words", "shell", "sound",
    "table", "timed_all_the_same", "update",
]  # fmt: skip


def ratio(perf: Perf) -> str:
    """1.23x [1.21, 1.25], with as many decimals as it takes to tell the three numbers from 1 (four at most)."""
    return _interval(perf.ratio, perf.ratio_low, perf.ratio_high)


def update(perf: Perf, compared: bool) -> str:
    """What an update of the weights takes, by itself or as a step has it, and, if compared, how many times as long the
    reference's does."""
    if perf.update_ms is None:
        return NOTHING
    values = (perf.update_ratio, perf.update_ratio_low, perf.update_ratio_high)
    known = compared and None not in values
    where = "" if perf.update_in_step else " by itself"
    return f"{number(perf.update_ms, 3)} ms{where}" + (f", {_interval(*values)}" if known else "")


def _interval(*values: float) -> str:
    distance = min((abs(value - 1) for value in values if math.isfinite(value) and value != 1), default=1.0)
    decimals = min(4, max(2, math.ceil(-math.log10(distance))))
    middle, low, high = (f"{value:.{decimals}f}" for value in values)
    return f"{middle}x [{low}, {high}]"


def sound(perf: Perf | None) -> bool:
    """Whether there is a time, of numbers that may be divided by."""
    if perf is None:
        return False
    values = (perf.real_tokens_per_s, perf.micro_step_ms, perf.ratio, perf.ratio_low, perf.ratio_high)
    return all(math.isfinite(value) and value > 0 for value in values)


def timed_all_the_same(record: Record) -> bool:
    """Whether the arm has a time that its verdict would forbid anyone but a peer."""
    return record.perf is not None and not record.verdict.level.lossless


def launches_saved(record: Record, stock: Record | None) -> int | None:
    """Device kernels a micro-step that the arm launches fewer than `stock`, the reference beside it; None where either count
    is unknown, or the arm was measured beside stock of another recipe."""
    if stock is None or stock is record or record.perf is None or stock.perf is None or record.recipe != stock.recipe:
        return None
    if record.perf.launches is None or stock.perf.launches is None:
        return None
    return stock.perf.launches - record.perf.launches


def setting_words(record: Record) -> str:
    """What was trained, in one line: model, method, dtype, pack length, steps. Keys that a recipe lacks are left out."""
    return markdown.trained(record.recipe, record.environment)


def dtype(record: Record) -> str | None:
    """The dtype that ran: what the environment names, since a recipe may say "auto"."""
    return markdown.dtype(record.recipe, record.environment)
