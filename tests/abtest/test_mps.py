"""The service by which processes share a GPU: joined only where it works, and gone when the command ends."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from abtest import mps
from abtest.mps import LOG, PIPE, joined, shared_gpu

# Notes how it was called and with what on stdin; a daemon leaves a mark in its pipe directory.
CONTROL = """#!/bin/sh
echo "$@ $(cat)$CUDA_VISIBLE_DEVICES" >> "{log}"
[ -d "$CUDA_MPS_PIPE_DIRECTORY" ] && [ -d "$CUDA_MPS_LOG_DIRECTORY" ] || exit 3
exit {code}
"""


@pytest.fixture
def service(tmp_path, monkeypatch):
    """service(code, usable) puts a stand-in on the path, and answers with the file of its calls."""

    def put(code: int = 0, usable: bool = True) -> Path:
        program, log = tmp_path / mps.CONTROL, tmp_path / "calls"
        program.write_text(CONTROL.format(log=log, code=code), encoding="utf-8")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.delenv(PIPE, raising=False)
        monkeypatch.setattr(mps, "_usable", lambda environment: usable and PIPE in environment)
        return log

    return put


def calls(log: Path) -> list[str]:
    return [line.strip() for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


def test_it_starts_and_is_ended_also_after_an_error(service, monkeypatch):
    """It is started for all GPUs, whichever this process may use."""
    log = service()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", " of mine")
    with pytest.raises(ZeroDivisionError), shared_gpu(True) as variables:
        assert set(variables) == {PIPE, LOG} and all(Path(path).is_dir() for path in variables.values())
        assert calls(log) == ["-d"] and PIPE not in os.environ and joined(variables) and not joined({})
        raise ZeroDivisionError
    assert calls(log) == ["-d", "quit -t 5 of mine"] and not any(Path(path).exists() for path in variables.values())


@pytest.mark.parametrize(("code", "usable"), [(1, True), (0, False)])
def test_a_service_that_does_not_work_is_not_joined(code, usable, service):
    log = service(code, usable)
    with shared_gpu(True) as variables:
        assert variables == {}
    assert calls(log)[-1] == "quit -t 5"


def test_a_service_of_the_users_own_is_left_alone(service, monkeypatch):
    log = service()
    monkeypatch.setenv(PIPE, "/somewhere")
    with shared_gpu(True) as variables:
        assert variables == {} and joined(variables)
    assert calls(log) == []


@pytest.mark.parametrize("wanted", [True, False])
def test_without_it_or_unasked_nothing_happens(wanted, tmp_path, service, monkeypatch):
    log = service()
    if wanted:
        monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with shared_gpu(wanted) as variables:
        assert variables == {}
    assert calls(log) == []


def test_the_probe_fails_where_there_is_no_driver(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(mps.ctypes, "CDLL", missing)
    assert mps.probe() == 1
