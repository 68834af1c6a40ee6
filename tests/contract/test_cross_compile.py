"""The silu_mul kernels compile for GPUs that are not here, with 16-byte memory access and without spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = {80: "sm_80", 90: "sm_90a", 120: "sm_120a", 121: "sm_121a"}
SHARED_LIMIT_BYTES = 101_376  # a block's most on sm_121a, the smallest of the four
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    script = Path(__file__).with_name("compile_silu_mul.py")
    command = [sys.executable, str(script), *map(str, TARGETS)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_target_compiles(compiled):
    assert len(compiled) == 2 * 2 * len(TARGETS)
    assert all(entry["target"] == TARGETS[entry["capability"]] for entry in compiled)


def test_nothing_spills(compiled):
    spilled = [entry for entry in compiled if entry["stack_bytes"] or entry["local_bytes"]]
    assert not spilled
    assert all(entry["registers"] <= 64 for entry in compiled)  # 64: 8 blocks of 4 warps on an SM, half of its threads
    assert all(entry["shared_bytes"] <= SHARED_LIMIT_BYTES for entry in compiled)


def test_every_access_is_16_bytes_wide(compiled):
    for entry in compiled:
        assert entry["loads"] == entry["vector_loads"] > 0, entry
        assert entry["stores"] == entry["vector_stores"] > 0, entry
