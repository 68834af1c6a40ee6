"""The line that closes a run of the lossless gates, from real runs of pytest."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from abtest.opcheck import SEEDS, workloads_for
from kernels.contract import Needs
from kernels.registry import discover

ROOT = Path(__file__).resolve().parents[2]
CPU = not torch.cuda.is_available()


def gates(*arguments: str) -> tuple[int, list[str]]:
    """Exit status and the lines of `pytest tests/lossless/test_ops.py`."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/lossless/test_ops.py", *arguments]
    done = subprocess.run(words, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout.splitlines()


def split(name: str) -> tuple[int, int]:
    """Gates of an op that are executed on a CPU, and those of workloads that only a GPU is given. There are both."""
    op = discover()[name].op
    small = len(SEEDS) * len(workloads_for(op, torch.device("cpu")))
    large = len(SEEDS) * len(op.workloads) - small
    assert small > 0 and large > 0
    return small, large


@pytest.mark.skipif(not CPU, reason="says what a box without a GPU leaves out")
def test_what_was_not_executed_is_counted():
    """Too large for this box, or skipped as the op needs a GPU."""
    small, large = split("static_lora")
    code, lines = gates("-k", "static_lora- or ssm_fast_path-")
    needy = len(SEEDS) * len(discover()["ssm_fast_path"].op.workloads)
    assert code == 0
    assert lines[-2] == f"lossless: {small} gates executed on cpu (interpreter), {large + needy} need a GPU"


@pytest.mark.skipif(not CPU, reason="says what a box without a GPU leaves out")
def test_what_was_not_executed_may_fail_the_run_whoever_executes_it():
    small, large = split("static_lora")
    code, lines = gates("-k", "static_lora-", "--require-gpu", "-n", "1")
    assert code == 1
    line = f"lossless: {small} gates executed on cpu (interpreter), {large} need a GPU"
    assert lines[-3:-1] == [line, f"--require-gpu: {large} gates were not executed, so this run fails"]


def test_without_a_gate_there_is_no_line():
    _, lines = gates("-k", "every_op_has_a_workload", "--require-gpu")
    assert lines and not any(line.startswith(("lossless:", "--require-gpu")) for line in lines)


@pytest.mark.parametrize(
    ("needs", "gpu_only", "lacking"),
    [
        (Needs(capability=((9, 0), (9, 0))), False, False),
        (Needs(capability=((10, 0), (10, 3))), False, True),
        (Needs(cuda=True, packages=("no_such_package",)), False, False),
        (Needs(cuda=True, packages=("no_such_package",)), True, False),
        (Needs(cuda=True), True, True),  # beyond its memory
    ],
)
def test_on_a_gpu_another_kind_of_gpu_is_hardware_that_is_not_there(monkeypatch, needs, gpu_only, lacking):
    spec = importlib.util.spec_from_file_location("tests_conftest", ROOT / "tests" / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, conftest)  # dataclasses look their module up
    spec.loader.exec_module(conftest)
    monkeypatch.setattr(conftest, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert conftest.lacks_hardware(needs, gpu_only) is lacking
