"""Microbenchmarks that are kept: one JSON line a measurement, in reports/data/micro/<device_slug>.jsonl, only ever appended.

A line holds what `bench.micro.run_micro` returned, where and by which command. It cannot hold a time unless every workload
matched its reference: constructing such a record raises ValueError, and so does reading one.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abtest import jsonl
from abtest.jsonl import expect, keys, number
from abtest.verdict import Level
from bench import by_device
from bench.recorder import Recorder, begin

if TYPE_CHECKING:
    import torch

SCHEMA = 1
FOLDER = "micro"
TEXTS = ("optimization", "device", "exactness", "level", "reason")
RESULT = (*TEXTS, "untimed", "ceilings", "workloads")
CEILINGS = ("copy_bytes_per_s", "matmul_flops_per_s", "copied_bytes", "matmul_size", "matmul_dtype")
CHECKED = ("shape", "dtype", "level", "max_error_ratio", "mean_error_ratio")
TIMED = (
    "reference_us", "candidate_us", "ratio", "ratio_low", "ratio_high", "samples", "tb_per_s", "tflop_per_s", "of_ceiling",
    "forward_us", "of_copies",
)  # fmt: skip


@dataclass(frozen=True)
class MicroRecord:
    """One call of `run_micro`. environment: what `abtest.environment.describe` says. result: what `run_micro` returned."""

    finished_at: str  # ISO 8601, UTC
    command: str
    environment: dict[str, Any]
    result: dict[str, Any]
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"record schema {self.schema} is not {SCHEMA}")
        _moment(self.finished_at)
        _check_result(self.result)

    @property
    def optimization(self) -> str:
        return self.result["optimization"]

    @property
    def finished(self) -> datetime:
        return _moment(self.finished_at)


def _moment(text: str) -> datetime:
    """A time without a zone is UTC. Raises ValueError for what is no ISO 8601 time."""
    try:
        return jsonl.moment(text)
    except ValueError as error:
        raise ValueError(f"finished_at {text!r:.60} is not an ISO 8601 time") from error


def _check_result(result: dict[str, Any]) -> None:
    """Raises one of `abtest.jsonl.DAMAGE` for what `run_micro` does not return."""
    keys(result, RESULT, "result")
    for name in TEXTS:
        expect(result[name], str, name)
    level = Level(result["level"])
    rows = expect(result["workloads"], dict, "workloads")
    timed = [_check_row(row, name) for name, row in rows.items()]
    if result["untimed"] is not None:
        expect(result["untimed"], str, "untimed")
    elif not timed:
        raise ValueError("there is no workload, and untimed does not say why")
    if set(timed) - {result["untimed"] is None}:
        raise ValueError("a workload has a time and a reason for having none, or neither")
    if any(timed) and not level.lossless:
        raise ValueError(f"{result['optimization']!r} is {level.value}: what does not match its reference holds no time")
    if any(timed):
        _check_ceilings(expect(result["ceilings"], dict, "ceilings"))


def _check_row(row: Any, name: str) -> bool:
    """Whether the workload was timed."""
    timed = "ratio" in expect(row, dict, f"workload {name!r:.60}")
    keys(row, (*CHECKED, *TIMED) if timed else CHECKED, f"workload {name!r:.60}", optional=("small",))
    for key in ("shape", "dtype", "level"):
        expect(row[key], str, key)
    Level(row["level"])
    expect(row.get("small", False), bool, "small")
    for key in ("max_error_ratio", "mean_error_ratio"):
        if row[key] is not None:
            number(row[key], key)
    for key in TIMED if timed else ():
        if key != "of_copies" or row[key] is not None:
            _finite(row[key], key)
    return timed


def _finite(value: Any, what: str) -> None:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{what} is {value!r:.60}, not a finite number")


def _check_ceilings(ceilings: dict[str, Any]) -> None:
    for key in keys(ceilings, CEILINGS, "ceilings"):
        if key == "matmul_dtype":
            expect(ceilings[key], str, key)
        else:
            _finite(ceilings[key], key)


def from_json(line: str) -> MicroRecord:
    """Raises one of `abtest.jsonl.DAMAGE` for a line that is no valid record."""
    fields = keys(
        expect(json.loads(line), dict, "the line"), [field.name for field in dataclasses.fields(MicroRecord)], "it"
    )
    for name, kind in (("finished_at", str), ("command", str), ("environment", dict), ("result", dict)):
        expect(fields[name], kind, name)
    expect(fields["environment"].get("versions", {}), dict, "versions")
    return MicroRecord(**fields)


def read(path: Path) -> list[MicroRecord]:
    """Every record of a file, in order. Raises UserError naming file and line for one that is not valid, or of a device
    that is not the file's."""
    return by_device.read(path, from_json)


def load(data_dir: Path) -> dict[str, list[MicroRecord]]:
    """By device slug, every record in `data_dir`/micro/<device_slug>.jsonl, in order; devices without any are left out."""
    return by_device.load(data_dir / FOLDER, read)


def recorder(device: torch.device, reports: Path, arguments: Sequence[str]) -> Recorder:
    """For results of `run_micro`. Raises UserError for a damaged line or a path that can't be."""
    return begin("bench.micro", FOLDER, MicroRecord, read, device, reports, arguments)
