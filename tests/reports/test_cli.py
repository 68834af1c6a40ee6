"""`python -m bench.report` as a user meets it: one clear line, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import synthetic_records as synthetic

from bench import records
from bench.report.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
SLUG = "example-gpu-x1"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bench.report", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), f"reports/data/{SLUG}/run.jsonl:2: not a valid record"),
        (("--check", "--reports", "nowhere"), "nowhere/data: no such folder of records"),
        (("--repotrs", "x"), "--repotrs"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, arguments, words):
    path = tmp_path / "reports" / "data" / SLUG / "run.jsonl"
    records.append(path, synthetic.record())
    path.write_bytes(path.read_bytes() + b'{"run_id": "torn, and \xf0\x9f')
    done = run(tmp_path, *arguments)
    assert done.returncode == 2 and words in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr and not done.stdout


def test_check_names_what_differs(tmp_path, capsys):
    records.append(tmp_path / "data" / SLUG / "run.jsonl", synthetic.record())
    options = ["--reports", str(tmp_path)]
    assert main([*options, "--check"]) == 1
    assert "README.md (missing)" in capsys.readouterr().err
    assert main(options) == 0
    assert main([*options, "--check"]) == 0
    capsys.readouterr()
    readme = tmp_path / SLUG / "README.md"
    readme.write_bytes(readme.read_bytes().replace(b"ROUNDING", b"BITWISE"))
    (tmp_path / SLUG / "silu_mul.png").unlink()
    assert main([*options, "--check"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{SLUG}/README.md (differs), {SLUG}/silu_mul.png (missing)" in error
    assert b"BITWISE" in readme.read_bytes()  # --check writes nothing
