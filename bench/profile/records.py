"""Profiles that are kept: one JSON line a profiled set, in reports/data/profile/<device_slug>.jsonl, only ever appended."""

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
from abtest.jsonl import expect, keys, strings
from bench import by_device
from bench.profile import groups, memory
from bench.recorder import Recorder, begin

if TYPE_CHECKING:
    import torch

SCHEMA = 1
FOLDER = "profile"
RESULT = ("optimizations", "shipping", "recipe", "enabled", "refused", "data", "phases", "memory", "stacks")
DATA = ("positions", "real_tokens", "supervised_tokens", "micro_steps_per_step", "content_hash")
PHASES = ("micro_step", "update", "step")
HOST = ("wall_s", "wall_low_s", "wall_high_s", "traced_wall_s", "groups", "names", "busy_s")
DEVICE = ("kernels", "copies", "launches", "graph_launches", "idle_s", "gaps", "idle_by")
ROW = ("name", "group", "owner", "seconds", "count")
GAP = ("at_s", "seconds", "host")
STACKS = ("samples", "rate_hz", "seconds", "frames", "nodes", "own")


@dataclass(frozen=True)
class ProfileRecord:
    """One profiled set. environment: what `abtest.environment.describe` says. result: of `bench.profile.measure.profile`,
    with the optimizations that were asked for, whether they were what ships, and the recipe."""

    finished_at: str  # ISO 8601, UTC
    command: str
    environment: dict[str, Any]
    result: dict[str, Any]
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"record schema {self.schema} is not {SCHEMA}")
        jsonl.moment(self.finished_at)
        _check_result(self.result)

    @property
    def finished(self) -> datetime:
        return jsonl.moment(self.finished_at)


def busy_share(phase: dict[str, Any]) -> float | None:
    """The part of the wall time, without the profiler, in which the device is busy, as its trace says; None on a CPU."""
    return None if phase["busy_s"] is None else phase["busy_s"] / phase["wall_s"]


def _check_result(result: dict[str, Any]) -> None:
    """Raises one of `abtest.jsonl.DAMAGE` for what `profile` does not return."""
    keys(result, RESULT, "result")
    for name in ("optimizations", "enabled"):
        strings(list(result[name]), name)
    expect(result["shipping"], bool, "shipping")
    for name in ("recipe", "refused", "stacks"):
        expect(result[name], dict, name)
    for key, value in keys(expect(result["data"], dict, "data"), DATA, "data").items():
        if key != "content_hash":
            _least(value, key)
    for name, phase in keys(expect(result["phases"], dict, "phases"), PHASES, "phases").items():
        _check_phase(expect(phase, dict, name), name)
    _check_memory(expect(result["memory"], dict, "memory"))
    _check_stacks(result["stacks"])


def _check_phase(phase: dict[str, Any], name: str) -> None:
    device = phase["busy_s"] is not None
    keys(phase, HOST + DEVICE if device else HOST, name)
    times = ("wall_s", "wall_low_s", "wall_high_s", "traced_wall_s", *(("busy_s", "idle_s", *DEVICE[:4]) if device else ()))
    for key in times:
        _least(phase[key], key)
    if not phase["wall_s"] > 0:
        raise ValueError(f"wall_s of {name} is {phase['wall_s']}; a step takes time")
    for group, seconds in expect(phase["groups"], dict, "groups").items():
        jsonl.one_of(group, tuple(groups.WORDS), "a group")
        _least(seconds, group)
    for row in expect(phase["names"], list, "names"):
        keys(expect(row, dict, "one of names"), ROW, "one of names")
        expect(row["name"], str, "name")
        jsonl.one_of(row["group"], tuple(groups.WORDS), "a group")
        _least(row["seconds"], "seconds"), _least(row["count"], "count")
    for gap in expect(phase["gaps"], list, "gaps") if device else ():
        keys(expect(gap, dict, "a gap"), GAP, "a gap")
        expect(gap["host"], str, "host")
        _least(gap["at_s"], "at_s"), _least(gap["seconds"], "seconds")
    for host, seconds in expect(phase["idle_by"], dict, "idle_by").items() if device else ():
        _least(seconds, host)


def _check_memory(sizes: dict[str, Any]) -> None:
    for key, value in keys(sizes, (*memory.WORDS, "counted_by"), "memory").items():
        if key == "counted_by":
            expect(value, str, key)
        elif value is not None:
            _least(jsonl.whole(value, key), key)


def _check_stacks(stacks: dict[str, Any]) -> None:
    if "missing" in stacks:
        expect(keys(stacks, ("missing",), "stacks")["missing"], str, "missing")
        return
    frames = strings(keys(stacks, STACKS, "stacks")["frames"], "frames")
    above = -1
    for depth, frame, samples in expect(stacks["nodes"], list, "nodes"):
        if not (0 <= jsonl.whole(depth, "a depth") <= above + 1 and 0 <= jsonl.whole(frame, "a frame") < len(frames)):
            raise ValueError(f"a node of depth {depth} and frame {frame} belongs to no place of the tree")
        jsonl.whole(samples, "samples")
        above = depth
    for frame, samples in expect(stacks["own"], list, "own"):
        expect(frame, str, "a frame"), jsonl.whole(samples, "samples")


def _least(value: Any, what: str) -> None:
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{what} is {value!r:.60}, not a number of at least 0")


def from_json(line: str) -> ProfileRecord:
    """Raises one of `abtest.jsonl.DAMAGE` for a line that is no valid record."""
    names = [field.name for field in dataclasses.fields(ProfileRecord)]
    fields = keys(expect(json.loads(line), dict, "the line"), names, "it")
    for name, kind in (("finished_at", str), ("command", str), ("environment", dict), ("result", dict)):
        expect(fields[name], kind, name)
    return ProfileRecord(**fields)


def read(path: Path) -> list[ProfileRecord]:
    """Every record of a file, in order. Raises UserError naming file and line for one that is not valid, or of a device
    that is not the file's."""
    return by_device.read(path, from_json)


def load(data_dir: Path) -> dict[str, list[ProfileRecord]]:
    """By device slug, every record in `data_dir`/profile/<device_slug>.jsonl, in order; devices without any are left out."""
    return by_device.load(data_dir / FOLDER, read)


def recorder(device: torch.device, reports: Path, arguments: Sequence[str]) -> Recorder:
    """For results of `bench.profile.measure.profile`. Raises UserError for a damaged line or a path that can't be."""
    return begin("bench.profile", FOLDER, ProfileRecord, read, device, reports, arguments)
