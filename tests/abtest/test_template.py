"""Arms that are forked from a process which has imported everything: processes like any others, and nobody left behind."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import CONFIG

from abtest import template
from abtest.arm import ROOT, Arm, ArmFailed, ArmSpec

pytestmark = pytest.mark.skipif(not template.usable(), reason="arms are not forked here")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
DRIVER = """
import os, sys
from pathlib import Path
from abtest import template
from abtest.arm import Arm, ArmSpec
from loop.config import Config

template.ROOT = Path(sys.argv[2])
arm = Arm(ArmSpec("orphan", Config(device="cpu")), Path(sys.argv[1]), dict(os.environ))
print(arm.process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
WORKER = """
import json, sys

def import_ahead():
    pass

def main():
    for line in sys.stdin:
        print(json.dumps({"answer": {"asked": json.loads(line)["command"]}}), flush=True)

if __name__ == "__main__":
    main()
"""

TORCH = """
import os

class cuda:
    _is_in_bad_fork = staticmethod(lambda: os.environ.get("SPOILED") == "True")
    is_initialized = staticmethod(lambda: False)
"""


@pytest.fixture
def light(tmp_path, monkeypatch) -> Path:
    """A checkout where templates are as they are, and the worker that they become imports nothing and only answers."""
    folder = tmp_path / "light"
    (folder / "abtest").mkdir(parents=True)
    shutil.copy(template.__file__, folder / "abtest" / "template.py")
    (folder / "abtest" / "worker.py").write_text(WORKER, encoding="utf-8")
    (folder / "abtest" / "__init__.py").touch()
    (folder / "torch.py").write_text(TORCH, encoding="utf-8")
    monkeypatch.setattr(template, "ROOT", folder)
    monkeypatch.setattr("abtest.arm.ROOT", folder)
    monkeypatch.setattr(template, "_templates", {})  # those that begin here end with the test
    return folder


def arm(folder: Path, name: str = "stock", **variables: str) -> Arm:
    return Arm(ArmSpec(name, CONFIG), folder, ENVIRONMENT | variables)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_arms_of_an_environment_are_forked_by_one_template(tmp_path):
    with arm(tmp_path) as one, arm(tmp_path, "other", PYTEST_CURRENT_TEST="another") as other:
        assert one.process.pid != other.process.pid != os.getpid()
        assert parent(one.process.pid) == parent(other.process.pid) != os.getpid()
        assert one.build()["weights"] == other.build()["weights"]
        theirs = {os.readlink(link) for link in Path(f"/proc/{other.process.pid}/fd").iterdir()}
        own = {os.readlink(link) for link in Path(f"/proc/{one.process.pid}/fd").iterdir()}
        assert not any("socket" in link or "pidfd" in link for link in own | theirs), "it holds something of the template's"
    assert one.process.returncode == other.process.returncode == 0
    assert not Path(f"/proc/{one.process.pid}").exists()


def test_a_template_that_was_started_ahead_is_the_one(light, tmp_path, monkeypatch):
    started, original = [], template._start
    monkeypatch.setattr(template, "_start", lambda *arguments: started.append(arguments) or original(*arguments))
    template.ahead(ENVIRONMENT)
    template.ahead(ENVIRONMENT)
    with arm(tmp_path, CUDA_MPS_PIPE_DIRECTORY="there") as one:
        assert one.build() == {"asked": "build"}
    assert len(started) == 1 and one.process.returncode == 0


def test_where_nothing_can_be_forked_nothing_is_started_ahead(monkeypatch):
    monkeypatch.setattr(template, "usable", lambda: False)
    monkeypatch.setattr(template, "_start", None)
    template.ahead(ENVIRONMENT)


def test_another_environment_has_a_template_of_its_own(light, tmp_path):
    with arm(tmp_path) as one, arm(tmp_path, "other") as other:
        with arm(tmp_path, "third", ELSE="1") as third:
            assert parent(third.process.pid) != parent(one.process.pid) == parent(other.process.pid)
        assert (one.process.poll(), other.process.poll(), third.process.returncode) == (None, None, 0)


def test_what_ends_an_arm_is_in_its_log_and_its_status(tmp_path):
    with arm(tmp_path) as one:
        with pytest.raises(ArmFailed, match=r"of arm stock ended with code 1: ValueError: unknown command 'reset'"):
            one.call("reset")
        assert one.process.wait() == 1
    with arm(tmp_path) as one:
        with pytest.raises(subprocess.TimeoutExpired):
            one.process.wait(0.05)
        one.process.kill()
        assert one.process.wait() == -signal.SIGKILL
        with pytest.raises(ArmFailed, match="ended with code -9"):
            one.build()


def test_a_template_that_is_gone_takes_no_arm_with_it_and_is_replaced(light, tmp_path):
    with arm(tmp_path) as one:
        os.kill(parent(one.process.pid), signal.SIGKILL)
        assert one.process.wait() == -signal.SIGKILL  # nobody can say any more how it ends
        assert one.build() == {"asked": "build"}
        with arm(tmp_path, "next") as following:
            assert following.build() == {"asked": "build"}
        assert following.process.returncode == 0


def test_nothing_outlives_a_driver_that_is_killed(light, tmp_path, gone):
    words = [sys.executable, "-c", DRIVER, str(tmp_path), str(light)]
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert gone(int(done.stdout), 30)


@pytest.mark.parametrize("asked", [False, True])
def test_where_an_import_asked_the_driver_arms_start_from_nothing(asked, light, tmp_path):
    """As CUDA's can't be forked once it was asked; torch knows in the child."""
    with arm(tmp_path, SPOILED=str(asked), CUDA_MPS_CLIENT_PRIORITY="1") as one:
        assert one.build() == {"asked": "build"}
        words = Path(f"/proc/{one.process.pid}/cmdline").read_text().split("\0")
        assert words[1:3] == ["-m", "abtest.worker" if asked else "abtest.template"]
        variables = Path(f"/proc/{one.process.pid}/environ").read_text().split("\0")
        assert not asked or {"SPOILED=True", "CUDA_MPS_CLIENT_PRIORITY=1"} <= set(variables)
        assert len(list(Path(f"/proc/{one.process.pid}/fd").iterdir())) == 3, "it holds something of the template's"
    assert one.process.returncode == 0


def test_arms_that_differ_in_what_cuda_reads_share_a_template(light, tmp_path):
    with arm(tmp_path) as one, arm(tmp_path, "other", CUDA_MPS_CLIENT_PRIORITY="1") as other:
        assert one.build() == other.build() == {"asked": "build"}
        assert parent(one.process.pid) == parent(other.process.pid)


def test_a_template_asks_no_driver_whether_there_is_a_gpu(light, tmp_path):
    with arm(tmp_path) as one:
        one.build()
        variables = Path(f"/proc/{parent(one.process.pid)}/environ").read_text().split("\0")
        assert "PYTORCH_NVML_BASED_CUDA_CHECK=1" in variables


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_every_arm_imports_asks_no_driver(tmp_path):
    """Or every arm would start from nothing, and nobody would notice but by the time it takes."""
    with arm(tmp_path) as one:
        one.build()
        assert Path(f"/proc/{one.process.pid}/cmdline").read_text().split("\0")[2] == "abtest.template"


@pytest.mark.parametrize("error", [OSError("no such call"), AttributeError("no such name"), None])
def test_where_the_system_lacks_what_it_takes_nothing_is_forked(error, light, tmp_path, monkeypatch):
    def lacking(pid):
        raise error

    assert template.usable()
    if error is None:  # as its user knows
        monkeypatch.setenv("ISOLOSS_FORK", "0")
    else:
        monkeypatch.setattr(os, "pidfd_open", lacking)
    monkeypatch.setattr(template, "usable", template.usable.__wrapped__)
    assert not template.usable()
    with arm(tmp_path) as one:
        assert isinstance(one.process, subprocess.Popen) and one.build() == {"asked": "build"}
    assert one.process.returncode == 0


def test_a_process_that_has_ended_before_anybody_said_so_can_be_killed():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with open(os.devnull, "rb") as nothing:
        process = template.Forked(ours, os.open(os.devnull, os.O_WRONLY), os.dup(nothing.fileno()))
    theirs.send(str(gone.pid).encode())
    process.kill()
    theirs.send(b"0")
    assert process.wait(timeout=5) == 0
    theirs.close()
