"""Arms as real processes: one each, a one-line message when one ends, and answers that no print can garble."""

from __future__ import annotations

import dataclasses
import io
import os
import stat
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import CONFIG

from abtest import examiner, states, worker
from abtest.arm import ROOT, Arm, ArmFailed, ArmSpec
from abtest.experiment import Experiment
from abtest.in_process import InProcessArm
from abtest.structure import gradients
from abtest.worker import Worker
from loop.config import DataConfig
from loop.errors import UserError
from loop.recipe import to_plain
from loop.training import build

PLANTED = "lora_scale_off:first:0.01"
# A worker whose `build` does what the arm's first optimization says. Named as the interpreter, it stands in for it.
STAND_IN = """#!{python}
import os, sys
sys.path.insert(0, {root!r})
import torch
from abtest import worker
from loop.errors import UserError

def build(self, config, optimizations, planted=None, exact=False):
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
    if what == "raise":
        raise RuntimeError("said over\\ntwo lines")
    return {{"pid": os.getpid(), "what": what}}

worker.Worker.build = build
worker.importlib.util.find_spec = lambda name: None  # what no arm here needs isn't imported
worker.main()
"""
SUDDEN_END = "#!/bin/sh\nread -r line; exit 3\n"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start("print"): an arm on the stand-in worker, to be used as a context manager."""
    script = tmp_path / "python"
    worker_like = STAND_IN.format(python=sys.executable, root=str(ROOT))
    script.touch(stat.S_IRWXU)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr("abtest.template.usable", lambda: False)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def make(what: str) -> Arm:
        script.write_text(SUDDEN_END if what == "exit" else worker_like, encoding="utf-8")
        return Arm(ArmSpec(what, CONFIG, (what,)), tmp_path, environment)

    return make


def ended(arm: Arm) -> bool:
    return arm.process.poll() is not None and not Path(f"/proc/{arm.process.pid}").exists()


def test_prints_do_not_garble_answers_and_a_mistake_of_the_users_ends_nothing(start, tmp_path):
    with start("print") as arm:
        for _ in range(2):
            with pytest.raises(UserError, match="no such thing"):
                arm.call("build", config={}, optimizations=["mistake"])
        steps = []
        built = arm.call("build", on_step=lambda *step: steps.append(step), config={}, optimizations=["print"])
        assert built == {"pid": arm.process.pid, "what": "print"} and steps == [(1, 2)]
        assert arm.build() == built == arm.built
        assert built["pid"] != os.getpid()
    assert ended(arm)
    log = (tmp_path / "print.log").read_text()
    assert "to stdout" in log and "forged" in log and "from a child process" in log


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("memory", "out of memory in build: CUDA out of memory. Tried a lot."),
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
    """After a mistake, too; and what is planted is built upon. Nobody asks for what it does not know."""
    absent = dataclasses.replace(CONFIG, data=DataConfig(path=tmp_path / "absent.jsonl"))
    with Arm(ArmSpec("stock", CONFIG), tmp_path, os.environ | {"OMP_NUM_THREADS": "1"}) as arm:
        with pytest.raises(UserError, match=r"absent\.jsonl"):
            arm.call("build", config=to_plain(absent), optimizations=[])
        theirs = arm.build()
        run = arm.call("free_run", steps=2)
        arm.spec = ArmSpec("planted", CONFIG, planted=PLANTED)
        planted = arm.build()
        with pytest.raises(ArmFailed, match="of arm planted ended with code 1: ValueError: unknown command 'reset'"):
            arm.call("reset")
    here = Worker(io.StringIO())
    ours = here.build(to_plain(CONFIG), [])
    assert theirs == ours and not ours["changed"]
    assert run == here.free_run(2)
    assert planted["enabled"] == [PLANTED] and planted["changed"] and planted["weights"] == ours["weights"]


def test_a_worker_notes_what_the_reference_was_off_by_and_computes_it_once(tmp_path, monkeypatch):
    made = Worker(io.StringIO())
    made.build(to_plain(CONFIG), [], exact=True)
    made.save_weights(str(tmp_path / "w.safetensors"))
    ask = {
        "weights": str(tmp_path / "w.safetensors"),
        "count": 6,
        "seed": 0,
        "folder": str(tmp_path / "o"),
        "budget": 1 << 30,
    }
    _, slow, _, overfit = states.names(30)
    answers = {(state, i): made.oracle(state, index=i, **ask) for state in (slow, overfit) for i in (0, 1, 4)}
    noted = {key: set(answer["notes"]) for key, answer in answers.items()}
    both = {"packing_error", "recurrence_error"}
    assert [noted[slow, i] for i in (0, 1, 4)] == [{"packing_error"}, both, set()]
    assert [noted[overfit, i] for i in (0, 1, 4)] == [{"packing_error"}, {"packing_error"}, set()]
    assert all(0 < error < 1e-9 for error, _ in answers[slow, 1]["notes"].values())
    assert len(list((tmp_path / "o").iterdir())) == 6
    monkeypatch.setattr(worker, "exact_gradients", None)
    assert {key: made.oracle(key[0], index=key[1], **ask) for key in answers} == answers


def test_a_state_between_is_noted_for_its_probe_with_the_most_boundaries(tmp_path):
    made = Worker(io.StringIO())
    made.build(to_plain(CONFIG), [], exact=True)
    path = str(tmp_path / "w.safetensors")
    made.save_weights(path)
    ask = {"weights": path, "count": 6, "seed": 0, "folder": str(tmp_path / "o"), "budget": 1 << 30}
    for state in (states.names(30)[0], states.names(30)[2]):
        assert [set(made.oracle(state, index=i, **ask)["notes"]) for i in (0, 1)][1] == {"packing_error"}


@pytest.mark.parametrize("alone", [True, False])
def test_where_two_runs_are_too_many_an_arm_s_own_makes_way_for_its_update(alone, tmp_path, monkeypatch):
    """One that was never let go would show in memory alone, on a device that is full. Behind it the arm is as it was."""
    made = Worker(io.StringIO())
    made.build(to_plain(CONFIG), [], planted=PLANTED)
    path = str(tmp_path / "w.safetensors")
    made.save_weights(path)
    at = {"state": "step 0", "weights": path, "count": 3, "seed": 0}

    def marks():
        made._load(path)
        return gradients(made.run, made._probe("step 0", 0, 3, 0)), made.run.enabled, sorted(made.own)

    before, first, there = marks(), weakref.ref(made.run.model), []

    def built(*arguments):
        there.append(first() is not None)
        return build(*arguments)

    monkeypatch.setattr(examiner, "build", built)
    made.update(**at | {"seed": 1}, alone=alone)  # probes that nobody has asked for yet
    assert there == [not alone] and (first() is made.run.model) == (not alone)
    assert marks() == before


# The same without a process


def test_without_a_process_an_arm_answers_the_same_and_fails_the_same(one_thread):
    with InProcessArm(ArmSpec("here", CONFIG, planted=PLANTED)) as arm:
        assert arm.build()["enabled"] == [PLANTED] and arm.built["elements"]
        with pytest.raises(UserError, match=r"^--plant nothing:first:1: nothing to plant is named 'nothing'"):
            arm.call("build", config=to_plain(CONFIG), optimizations=[], planted="nothing:first:1")
        with pytest.raises(ArmFailed, match=r"^free_run of arm here: RuntimeError: said over$") as failure:
            arm.worker.free_run = raises(RuntimeError("said over\ntwo lines"))
            arm.call("free_run", steps=1)
        assert isinstance(failure.value.__cause__, RuntimeError)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("no more"), UserError("yours")], ids=repr)
def test_without_a_process_not_every_error_is_the_arm_s(error):
    arm = InProcessArm(ArmSpec("here", CONFIG))
    arm.worker.free_run = raises(error)
    with pytest.raises(type(error)):
        arm.call("free_run", steps=1)


def raises(error: BaseException):
    def command(**arguments):
        raise error

    return command


def test_a_run_that_rested_is_as_it_was_when_it_was_built(tmp_path):
    made = Worker(io.StringIO())
    built = made.build(to_plain(CONFIG), [], planted=PLANTED)
    path = str(tmp_path / "w.safetensors")
    made.save_weights(path)

    def marks():
        made._load(path)
        return gradients(made.run, made._probe("step 0", 0, 3, 0)), made.run.enabled, sorted(made.own)

    before, first = marks(), weakref.ref(made.run.model)
    made.prepare_timing(1, 1)
    assert made.rest() == made.give_back() == {} and first() is None and made.batches == []
    assert made.resume() == {} and marks() == before
    made.prepare_timing(1, 1)
    assert made.time_block()["seconds"] > 0 and built["changed"]


@pytest.mark.parametrize("crowded", [False, True])
def test_the_reference_rests_where_arms_take_turns(crowded):
    asked: list[str] = []
    experiment = SimpleNamespace(crowded=crowded, reference_arm=SimpleNamespace(call=asked.append))
    with pytest.raises(ArmFailed, match="broke"), Experiment.without_reference(experiment):
        asked.append("inside")
        raise ArmFailed("broke")
    assert asked == (["rest", "inside", "resume"] if crowded else ["inside"])
