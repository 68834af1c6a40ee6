"""One JSON document with every arm's verdict and numbers: the last line that `python -m bench.run` prints."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from bench.records import Record
from bench.report.devices import finished, select
from bench.report.shipping import decide

PERF = (
    "ratio", "ratio_low", "ratio_high", "real_tokens_per_s", "positions_per_s", "supervised_tokens_per_s",
    "peak_memory_bytes", "mfu", "launches", "update_ms", "update_ratio", "update_ratio_low", "update_ratio_high",
    "update_in_step",
)  # fmt: skip


def summary_json(records: Sequence[Record]) -> str:
    """One line of strict JSON about the newest run in `records`, which are all of one device.

    A number that an arm does not have, or that is not finite, is null. Raises ValueError for no records at all.
    """
    if not records:
        raise ValueError("a summary needs at least one record")
    device = select(str(records[0].environment.get("device_slug", "unknown")), records)
    newest = max(device.settings, key=lambda setting: finished(setting.newest))
    document = {
        "run_id": newest.run_id,
        "device": device.name,
        "model": newest.current[0].recipe.get("model"),
        "arms": [_arm(record) for record in newest.current],
        "shipping": list(decide(newest.run).enable),
        "report": f"reports/{device.slug}/README.md",
    }
    return json.dumps(document, allow_nan=False)


def _arm(record: Record) -> dict[str, Any]:
    fields = {"arm": record.arm, "role": record.role, "level": record.verdict.level.value, "reason": record.verdict.reason}
    numbers = {name: _finite(getattr(record.perf, name, None)) for name in PERF}
    return {**fields, **numbers, "untimed": record.untimed}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
