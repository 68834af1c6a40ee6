"""Arms that get ready before their turn: taken when they are, waited for before anything is timed, and never left behind."""

from __future__ import annotations

import os
import stat
import sys
import time
from pathlib import Path

import pytest
from tiny import CONFIG

from abtest.arm import Arm, ArmSpec
from abtest.experiment import Experiment
from abtest.settings import GateConfig

# Says how often it was asked, and takes its time to get ready; an arm called "broken" fails at that.
STAND_IN = """#!/bin/sh
[ "$3" = long ] && trap 'touch "$0.interrupted"; exit 0' INT
asked=0
while read -r line; do
  asked=$((asked + 1))
  case "$line:$3" in
    *ahead*:broken) echo '{"failed": "ahead: no"}'; exit 0 ;;
    *ahead*:long) sleep 60 > /dev/null & wait ;;
    *ahead*) sleep 0.3 ;;
  esac
  echo "{\\"answer\\": {\\"asked\\": $asked, \\"pid\\": $$}}"
done
"""


@pytest.fixture
def script(tmp_path, monkeypatch) -> Path:
    script = tmp_path / "python"
    script.write_text(STAND_IN, encoding="utf-8")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr("abtest.template.usable", lambda: False)
    return script


@pytest.fixture
def experiment(tmp_path, script) -> Experiment:
    settings = GateConfig(steps=4, replicas=4, probes=4, oracle_cache=tmp_path / "oracle")
    with Experiment(CONFIG, settings, tmp_path, dict(os.environ), lambda *progress: None) as experiment:
        yield experiment


def peer(name: str) -> ArmSpec:
    return ArmSpec(name, CONFIG, worker=("peer", name))


def ended(arm: Arm) -> bool:
    return arm.process.poll() is not None


def test_an_arm_is_asked_to_get_ready_and_then_taken_as_it_is(experiment):
    began = time.monotonic()
    experiment.begin_ahead(peer("one"))
    assert time.monotonic() - began < 0.25, "nobody waits for it"
    waiting = experiment.waiting.begun[peer("one")].arm
    with experiment._arm(peer("one")) as arm:
        assert arm is waiting and arm.seconds is experiment.calls
        assert time.monotonic() - began > 0.25, "it was ready when it was taken"
        assert arm.build() == {"asked": 2, "pid": arm.process.pid}
    assert not experiment.waiting.begun
    with experiment._arm(peer("one")) as again:  # a second one of that name starts from nothing
        assert again.build()["asked"] == 1


def test_another_arm_takes_nobody_s_place(experiment):
    experiment.begin_ahead(peer("one"))
    with experiment._arm(ArmSpec("one", CONFIG)) as arm:
        assert arm is not experiment.waiting.begun[peer("one")].arm


def test_what_fails_to_get_ready_is_started_anew_in_its_turn(experiment):
    experiment.begin_ahead(peer("broken"))
    waiting = experiment.waiting.begun[peer("broken")].arm
    with experiment._arm(peer("broken")) as arm:
        assert arm is not waiting and ended(waiting)
        assert arm.build()["asked"] == 1


def test_nothing_is_at_work_any_more_when_it_is_quiet(experiment):
    for name in ("one", "other"):
        experiment.begin_ahead(peer(name))
    experiment.waiting.quiet()
    assert not any(one.thread.is_alive() for one in experiment.waiting.begun.values())


def test_an_experiment_that_ends_interrupts_whoever_is_still_at_it(tmp_path, script):
    with Experiment(CONFIG, GateConfig(), tmp_path, dict(os.environ), lambda *progress: None) as experiment:
        for name in ("long", "ready"):
            experiment.begin_ahead(peer(name))
        time.sleep(0.8)
        arms = [one.arm for one in experiment.waiting.begun.values()]
        began = time.monotonic()
    assert all(ended(arm) for arm in arms) and time.monotonic() - began < 5
    assert Path(f"{script}.interrupted").exists(), "it could tidy up"
