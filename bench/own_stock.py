"""What a record says of an arm that was compared with stock of its own recipe, not with the run's."""

from __future__ import annotations

from typing import Any

from bench.records import Perf
from loop.config import Config
from loop.recipe import to_plain


def changed(own: Config, config: Config) -> dict[str, Any]:
    """The top-level keys of `own`, as a recipe has them, that differ from `config`'s; tables whole."""
    before = to_plain(config)
    return {key: value for key, value in to_plain(own).items() if value != before.get(key)}


def note(own: Config, config: Config, stock: Perf | None) -> str:
    """What its stock was, and how fast: `stock` was timed in turn with the arm."""
    before = to_plain(config)
    keys = []
    for key, value in changed(own, config).items():
        table = value.items() if isinstance(value, dict) else ()
        keys += [f"{key}.{name} = {item}" for name, item in table if item != before[key].get(name)]
        keys += [] if isinstance(value, dict) else [f"{key} = {value}"]
    words = f"Compared with stock of its own recipe: {', '.join(keys)}."
    if stock is None:
        return words
    launches = "" if stock.launches is None else f", {stock.launches:,} kernel launches a micro-step"
    return (
        f"{words} That stock: {stock.real_tokens_per_s:,.0f} real tokens/s, {stock.positions_per_s:,.0f} positions/s, "
        f"peak memory {stock.peak_memory_bytes / 2**30:.2f} GiB{launches}."
    )
