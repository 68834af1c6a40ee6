"""Arms as real processes: one each, a one-line message when one ends, and answers that no print can garble."""

from __future__ import annotations

import dataclasses
import io
import os
import stat
import sys
from pathlib import Path

import pytest
from in_process import CONFIG

from abtest.arm import ROOT, Arm, ArmFailed, ArmSpec
from abtest.worker import Worker
from loop.config import DataConfig
from loop.errors import UserError
from loop.recipe import to_plain

# A worker whose `build` does what the arm's first optimization says. Named as the interpreter, it stands in for it.
STAND_IN = """#!{python}
import os, sys
sys.path.insert(0, {root!r})
import torch
from abtest import worker
from loop.errors import UserError

def build(self, config, optimizations, exact):
    what = optimizations[0]
    if what == "print":
        print("to stdout", flush=True)
        os.write(1, b'{{"answer": "forged"}}')
        os.system("echo from a child process")
        self.event(event="step", step=1, steps=2)
    if what == "mistake":
        raise UserError("no such thing as\\n a line break")
    if what == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried a lot.\\nSee the documentation.")
    if what == "exit":
        os._exit(3)
    if what == "raise":
        raise RuntimeError("said over\\ntwo lines")
    return {{"pid": os.getpid(), "what": what}}

worker.Worker.build = build
worker.main()
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start("print"): an arm on the stand-in worker, to be used as a context manager."""
    script = tmp_path / "python"
    script.write_text(STAND_IN.format(python=sys.executable, root=str(ROOT)), encoding="utf-8")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(script))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def make(what: str) -> Arm:
        return Arm(ArmSpec(what, CONFIG, (what,)), tmp_path, environment)

    return make


def ended(arm: Arm) -> bool:
    return arm.process.poll() is not None and not Path(f"/proc/{arm.process.pid}").exists()


def test_prints_do_not_garble_answers(start, tmp_path):
    with start("print") as arm:
        steps = []
        built = arm.call("build", on_step=lambda *step: steps.append(step), config={}, optimizations=["print"], exact=False)
        assert built == {"pid": arm.process.pid, "what": "print"} and steps == [(1, 2)]
        assert arm.build() == built == arm.built
        assert built["pid"] != os.getpid()
    assert ended(arm)
    log = (tmp_path / "print.log").read_text()
    assert "to stdout" in log and "forged" in log and "from a child process" in log


def test_a_mistake_of_the_users_passes_through_and_the_arm_lives_on(start):
    with start("mistake") as arm:
        for _ in range(2):
            with pytest.raises(UserError, match="no such thing"):
                arm.build()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("memory", "out of memory: CUDA out of memory. Tried a lot."),
        ("exit", "the process of arm exit ended with code 3: no output"),
        ("raise", "the process of arm raise ended with code 1: two lines"),
    ],
)
def test_an_arm_that_ends_says_so_in_one_line(start, what, message):
    with start(what) as arm:
        with pytest.raises(ArmFailed) as failure:
            arm.build()
        assert str(failure.value) == message
        assert ("RuntimeError: said over" in failure.value.output) == (what == "raise")
        with pytest.raises(ArmFailed):  # and again, whatever is asked of it
            arm.build()
    assert ended(arm)


def test_an_arm_killed_from_outside(start):
    with pytest.raises(ArmFailed, match="the process of arm print ended with code -9"), start("print") as arm:
        arm.process.kill()
        arm.process.wait()
        arm.build()
    assert ended(arm)


def test_an_error_in_between_ends_the_process_at_once(start):
    with pytest.raises(KeyboardInterrupt), start("print") as arm:
        raise KeyboardInterrupt
    assert ended(arm)


def test_a_real_arm_builds_what_this_process_builds(tmp_path, one_thread):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with Arm(ArmSpec("stock", CONFIG), tmp_path, environment) as arm:
        theirs = arm.build()
        run = arm.call("free_run", steps=2)
    here = Worker(io.StringIO())
    ours = here.build(to_plain(CONFIG), [])
    assert theirs == ours
    assert run == here.free_run(2)


def test_a_real_arm_passes_a_wrong_path_on(tmp_path):
    data = DataConfig(path=tmp_path / "absent.jsonl")
    spec = ArmSpec("stock", dataclasses.replace(CONFIG, data=data))
    with pytest.raises(UserError, match=r"absent\.jsonl"), Arm(spec, tmp_path, dict(os.environ)) as arm:
        arm.build()
