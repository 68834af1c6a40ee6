"""Exact gradients on disk: found again, kept apart, bounded, never half a file."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file
from tiny import CONFIG

from abtest import oracle_cache
from abtest.oracle_cache import RECENT, OracleCache
from abtest.settings import GateConfig
from abtest.truths import Truths
from abtest.worker import Worker
from loop import files
from loop.config import LoraConfig
from loop.recipe import to_plain

ELEMENTS = 1000
SIZE = 4 * ELEMENTS
HEADER = 200  # bytes that a file has on top, at most


def made(value: float, notes: dict[str, str] | None = None):
    calls = []

    def make():
        calls.append(value)
        return {"weight": torch.full((ELEMENTS,), value), "bias": torch.zeros(0)}, notes or {}

    return make, calls


def age(path: Path, seconds: float) -> None:
    stamp = path.stat().st_mtime - seconds
    os.utime(path, (stamp, stamp))


def test_a_file_is_made_once_and_gives_its_notes_back(tmp_path: Path) -> None:
    notes = {"packing_error": '[1e-07, "weight"]', "recurrence_error": "null"}
    cache, (make, calls) = OracleCache(tmp_path / "new" / "folder", 10 * SIZE), made(3.0, notes)
    path = cache.path("model", "weights", "probe", torch.float64)
    assert cache.get(path, make) == notes
    assert cache.get(path, make).items() >= notes.items() and calls == [3.0]
    again = OracleCache(tmp_path / "new" / "folder", 10 * SIZE)
    assert again.get(again.path("model", "weights", "probe", torch.float64), make).items() >= notes.items()
    assert calls == [3.0]
    kept = load_file(path)
    assert torch.equal(kept["weight"], torch.full((ELEMENTS,), 3.0)) and kept["bias"].numel() == 0


def test_gradients_of_a_view_or_another_layout_are_kept_whole(tmp_path: Path) -> None:
    wide = torch.arange(12.0).view(3, 4)
    cache = OracleCache(tmp_path, 10 * SIZE)
    path = cache.path("views")
    cache.get(path, lambda: ({"turned": wide.T, "part": wide[:, 1:3]}, {}))
    kept = load_file(path)
    assert torch.equal(kept["turned"], wide.T) and torch.equal(kept["part"], wide[:, 1:3])


def test_whatever_determines_the_gradients_names_the_file(tmp_path: Path, monkeypatch) -> None:
    cache = OracleCache(tmp_path, SIZE)
    facts = ("model", "weights", "probe", torch.float64, torch.float32)
    paths = {cache.path(*facts)}
    for index in range(len(facts)):
        paths.add(cache.path(*facts[:index], "another", *facts[index + 1 :]))
    paths.add(cache.path("model", "weightsprobe", "", torch.float64, torch.float32))
    monkeypatch.setattr(oracle_cache, "version", lambda: "another")
    paths.add(cache.path(*facts))
    assert len(paths) == len(facts) + 3 and all(path.parent == tmp_path for path in paths)


def test_the_version_follows_sources_and_libraries(tmp_path: Path, monkeypatch) -> None:
    versions = {oracle_cache.version()}
    for name in oracle_cache.SOURCES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((oracle_cache.ROOT / name).read_bytes())
    monkeypatch.setattr(oracle_cache, "ROOT", tmp_path)
    versions.add(oracle_cache.version.__wrapped__())
    assert len(versions) == 1  # a copy is the same
    for name in oracle_cache.SOURCES:
        with (tmp_path / name).open("a") as file:
            file.write("# changed\n")
        versions.add(oracle_cache.version.__wrapped__())
    monkeypatch.setattr(oracle_cache.metadata, "version", lambda package: "0.0")
    versions.add(oracle_cache.version.__wrapped__())
    assert len(versions) == len(oracle_cache.SOURCES) + 2


def test_a_file_that_was_cut_short_is_made_again(tmp_path: Path) -> None:
    cache = OracleCache(tmp_path, 10 * SIZE)
    path = cache.path("cut")
    cache.get(path, made(1.0)[0])
    for content in (path.read_bytes()[:-10], b"", b"no tensors at all"):
        path.write_bytes(content)
        make, calls = made(2.0)
        cache.get(path, make)
        assert calls == [2.0] and float(load_file(path)["weight"][0]) == 2.0


def test_the_oldest_go_first_and_the_new_one_stays(tmp_path: Path) -> None:
    cache = OracleCache(tmp_path, 3 * (SIZE + HEADER))
    paths = [cache.path(index) for index in range(4)]
    for index, path in enumerate(paths[:3]):
        cache.get(path, made(float(index))[0])
        age(path, RECENT + 100 - index)
    make, calls = made(0.0)
    cache.get(paths[0], make)  # a hit: now it is the newest
    assert calls == []
    cache.get(paths[3], made(3.0)[0])
    assert [path.exists() for path in paths] == [True, False, True, True]
    assert cache.held() <= cache.budget


def test_a_file_larger_than_the_budget_is_still_there(tmp_path: Path) -> None:
    cache = OracleCache(tmp_path, SIZE // 2)
    one, other = cache.path("one"), cache.path("other")
    cache.get(one, made(1.0)[0])
    assert one.exists()
    age(one, RECENT + 1)
    cache.get(other, made(2.0)[0])
    assert other.exists() and not one.exists()
    assert float(load_file(other)["weight"][0]) == 2.0


def test_half_of_the_free_disk_is_the_most(tmp_path: Path, monkeypatch) -> None:
    first = OracleCache(tmp_path, 10 * SIZE)
    first.get(first.path("one"), made(1.0)[0])
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    cache = OracleCache(tmp_path, 10**12)
    assert cache.room == first.held() + 500
    cache.get(cache.path("two"), made(2.0)[0])  # even what was used just now goes then
    assert [path.name for path in tmp_path.iterdir()] == [cache.path("two").name]


def test_what_a_gate_may_be_about_to_read_stays(tmp_path: Path) -> None:
    """Gates beside each other share the folder, and what one has just asked for is not the other's to throw out."""
    cache = OracleCache(tmp_path, SIZE + HEADER)
    paths = [cache.path(index) for index in range(4)]
    for index, path in enumerate(paths[:3]):
        cache.get(path, made(float(index))[0])
    assert all(path.exists() for path in paths[:3]) and cache.held() > 2 * cache.budget
    for path in paths[:3]:
        age(path, RECENT + 1)
    truths = Truths(lambda: None, GateConfig(), {"step 0": ""}, lambda arm, phase, done, total: None)
    truths.paths["step 0", 1] = str(paths[1])
    assert truths.get("step 0", 1) == str(paths[1])  # wanted again: as good as used
    cache.get(paths[3], made(3.0)[0])
    assert [path.exists() for path in paths] == [False, True, False, True]


def test_a_file_that_another_gate_takes_away_meanwhile_is_no_error(tmp_path: Path, monkeypatch) -> None:
    cache = OracleCache(tmp_path, SIZE)
    cache.get(cache.path("one"), made(1.0)[0])
    gone = tmp_path / "gone.safetensors"
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: iter([gone, cache.path("one")]))
    assert cache.held() == cache.path("one").stat().st_size
    cache.get(cache.path("two"), made(2.0)[0])
    assert cache.path("two").exists()


def test_an_oracle_that_is_started_for_a_missing_file_ends_with_it(tmp_path: Path) -> None:
    """It holds more memory than any other arm, and nobody would end it."""
    arm, started = MagicMock(), []
    arm.call = MagicMock(side_effect=lambda command, **at: {"path": str(tmp_path / f"{at['index']}"), "notes": {}})
    truths = Truths(lambda: started.append(1) or arm, GateConfig(), {"step 0": ""}, lambda *step: None)
    truths.build()
    truths.get("step 0", 0)
    assert truths.arm is arm and not arm.__exit__.called
    truths.end()
    for _ in range(2):  # its file is never there
        assert truths.get("step 0", 0) == str(tmp_path / "0")
    assert truths.arm is None and len(started) == 3 and arm.__exit__.call_count == 3


def test_a_torn_write_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    cache = OracleCache(tmp_path, 10 * SIZE)
    path = cache.path("torn")

    def half(tensors, name, metadata=None):
        Path(name).write_bytes(b"\x08\0\0\0\0\0\0\0{")
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files, "save_file", half)
        with pytest.raises(OSError, match="no space"):
            cache.get(path, made(1.0)[0])
    assert list(tmp_path.iterdir()) == []
    make, calls = made(1.0)
    cache.get(path, make)
    assert calls == [1.0] and float(load_file(path)["weight"][0]) == 1.0


def test_an_oracle_that_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = OracleCache(tmp_path, 10 * SIZE)

    def fails():
        raise RuntimeError("the oracle has no gradient for 1 parameters")

    with pytest.raises(RuntimeError, match="no gradient"):
        cache.get(cache.path("one"), fails)
    assert list(tmp_path.iterdir()) == []


def test_other_files_in_the_folder_are_nobodys_business(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine" * 10_000)
    cache = OracleCache(tmp_path, SIZE // 2)
    cache.get(cache.path("one"), made(1.0)[0])
    assert (tmp_path / "notes.txt").exists() and cache.held() < SIZE + HEADER


def test_models_that_share_weights_alone_share_no_file() -> None:
    """LoRA's scale and a model's settings are in no tensor, and the gradients depend on them."""

    def mark(**changes) -> str:
        worker = Worker(io.StringIO())
        worker.build(to_plain(dataclasses.replace(CONFIG, model="mistral-tiny", **changes)), [])
        return worker.model_mark

    one = mark()
    assert one == mark() and one != mark(lora=LoraConfig(rank=4, alpha=16.0)) and one != mark(seed=1)


def test_of_what_is_noted_the_worst_is_kept() -> None:
    truths = Truths(lambda: None, GateConfig(), {"step 0": ""}, lambda arm, phase, done, total: None)
    for value in (1e-7, 3e-7, 2e-7):
        truths._note("step 0", {"packing_error": [value, f"{value}"], "recurrence_error": None})
    assert truths.notes["step 0"] == {"packing_error": [3e-7, "3e-07"]}
    for value in (float("nan"), 1e-7):  # nothing outranks a number that is none
        truths._note("step 0", {"packing_error": [value, "weight"]})
    assert truths.notes["step 0"]["packing_error"][0] != truths.notes["step 0"]["packing_error"][0]
