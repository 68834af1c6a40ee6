"""Compiles every case in a process of its own, where Triton compiles whatever this one does, and collects what came out."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from abtest import jsonl
from bench.cross_compile.records import Outcome, parse_planned
from loop.errors import UserError

ROOT = Path(__file__).parents[2]
CHANGES_CODE = ("DISABLE_PTXAS_OPT", "PTXAS_OPTIONS")
MISTAKE = 2  # the exit status of a user's mistake, see loop.cli


def compile_cases(names: Sequence[str] = ()) -> list[Outcome]:
    """Every case of the named optimizations, or of all, for every target of it, in the order of the record.

    A case that kills its compiler is one that does not compile; the others are compiled all the same. Raises UserError where
    Triton can't be imported, or a folder's `cross_compile.py` is wrong.
    """
    with tempfile.TemporaryDirectory(prefix="cross-compile-") as folder:
        scratch = Path(folder)
        results = scratch / "outcomes.jsonl"
        while True:
            done = _work(scratch, names)
            found = _outcomes(results)
            if done.returncode == 0:
                return found
            plan = _outcomes(scratch / "plan.jsonl")
            if done.returncode == MISTAKE or len(found) >= len(plan):
                raise UserError(_cause(done).removeprefix("error: "))
            died = dataclasses.replace(plan[len(found)], error=_cause(done))
            jsonl.append(results, jsonl.dumps(died))


def environment() -> dict[str, str]:
    """This process's, without what makes Triton interpret or compile otherwise than by default; paths of its tools stay."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in CHANGES_CODE and (not name.startswith("TRITON_") or name.endswith("_PATH"))
    }
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def _work(scratch: Path, names: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.cross_compile.worker", str(scratch), *names]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, errors="replace", check=False)


def _outcomes(file: Path) -> list[Outcome]:
    return jsonl.read(file, parse_planned) if file.is_file() else []


def _cause(done: subprocess.CompletedProcess[str]) -> str:
    """Why a process died, in words that are the same the next time: no addresses of a stack trace."""
    lines = done.stderr.strip().splitlines()
    if done.returncode >= 0:
        return lines[-1] if lines else f"status {done.returncode}"
    reason = next((f": {line.strip()}" for line in lines if "LLVM ERROR" in line), "")
    return f"the compiler was ended by {signal.Signals(-done.returncode).name}{reason}"
