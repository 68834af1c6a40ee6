"""Op checks of `python -m abtest.run`: in this process, or as one more of those that share a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from abtest import run
from abtest.arm import ArmFailed
from abtest.mps import PIPE, PRIORITY

CPU = torch.device("cpu")
COMMAND = run.Command(optimization=("static_lora",))
ROW = {"op": "static_lora", "workload": "small", "seed": 0, "level": "BITWISE", "reason": "same bits"}


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def progress(told) -> SimpleNamespace:
    return SimpleNamespace(say=told.append)


def test_alone_they_run_here(monkeypatch, tmp_path, progress, told):
    monkeypatch.delenv(PIPE, raising=False)
    monkeypatch.setattr(run, "Arm", None)  # no process
    monkeypatch.setattr(run, "op_reports", lambda optimizations, device: [ROW | {"op": one.name} for one in optimizations])
    assert run._op_checks(COMMAND, CPU, tmp_path, {}, progress) == [ROW]
    assert told == ["1 op checks, 0 failed"]


def test_where_a_gpu_is_shared_they_join_in(monkeypatch, tmp_path, progress):
    arm = MagicMock()
    arm.return_value.__enter__.return_value.call.return_value = {"rows": [ROW]}
    monkeypatch.setattr(run, "Arm", arm)
    assert run._op_checks(COMMAND, CPU, tmp_path, {PIPE: "a service"}, progress) == [ROW]
    assert arm.call_args.args[2] == {PIPE: "a service", PRIORITY: "1"}  # behind the oracle


def test_a_process_that_ends_has_failed(monkeypatch, tmp_path, progress, told):
    arm = MagicMock()
    arm.return_value.__enter__.return_value.call.side_effect = ArmFailed("ended with code 1: a fault", "its last words")
    arm.return_value.__exit__.return_value = False
    monkeypatch.setattr(run, "Arm", arm)
    (row,) = run._op_checks(COMMAND, CPU, tmp_path, {PIPE: "a service"}, progress)
    assert row["level"] == "FAILED" and "a fault" in row["reason"]
    assert told == ["its last words", "1 op checks, 1 failed"]


@pytest.mark.parametrize("command", [run.Command(optimization=("static_lora",), ops=False), run.Command(plant="x")])
def test_nothing_is_checked_that_nobody_asked_for(command, tmp_path, progress, told):
    assert run._op_checks(command, CPU, tmp_path, {}, progress) == [] and not told
