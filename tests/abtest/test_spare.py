"""The process kept ready for the arm after this one: handed on, and never left behind."""

from __future__ import annotations

import os
import stat
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny import CONFIG

from abtest.arm import Arm, ArmFailed, ArmSpec
from abtest.experiment import Experiment
from abtest.settings import GateConfig

# Answers every command with its own process id, as long as somebody may still ask.
STAND_IN = """#!/bin/sh
while read -r line; do echo "{\\"answer\\": {\\"pid\\": $$}}"; done
"""


def silent(arm: str, phase: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture
def settings(tmp_path) -> GateConfig:
    return GateConfig(steps=4, replicas=4, probes=4, oracle_cache=tmp_path / "oracle")


@pytest.fixture
def experiment(tmp_path, settings, monkeypatch) -> Experiment:
    script = tmp_path / "python"
    script.write_text(STAND_IN, encoding="utf-8")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr("abtest.template.usable", lambda: False)
    return Experiment(CONFIG, settings, tmp_path, dict(os.environ), silent)


def ended(arm: Arm) -> bool:
    return arm.process.poll() is not None and not Path(f"/proc/{arm.process.pid}").exists()


def test_the_next_arm_takes_the_spare_under_its_own_name(experiment):
    with experiment:
        first, spec = experiment.spares[0], ArmSpec("faster", CONFIG, ("faster",), "planted:first:1")
        assert first is not experiment.reference_arm and not ended(first)
        assert first.spec.name == "after stock, 1"
        with experiment._arm(spec) as arm:
            assert arm is first and arm.spec == spec
            assert arm.build() == {"pid": first.process.pid}
            second = experiment.spares[0]
            assert second.process.pid not in (first.process.pid, experiment.reference_arm.process.pid)
            assert not ended(second) and second.spec == ArmSpec("after faster, 1", CONFIG)
        assert ended(first) and not ended(second) and not ended(experiment.reference_arm)
    assert ended(second) and ended(experiment.reference_arm)


def test_every_process_ends_with_the_experiment_the_oracle_s_too(experiment):
    with experiment:
        experiment.repeat_arm = experiment._arm(ArmSpec("stock again", CONFIG))
        experiment.truths.build()
        assert experiment.truths.arm.spec == ArmSpec("oracle", CONFIG, exact=True)
        arms = [experiment.reference_arm, experiment.repeat_arm, experiment.truths.arm, experiment.spares[0]]
        assert len({arm.process.pid for arm in arms}) == 4 and not any(ended(arm) for arm in arms)
    assert all(ended(arm) for arm in arms)


def test_the_repeat_ends_once_and_the_spare_with_the_experiment(experiment):
    with experiment:
        experiment.repeat_arm = repeat = experiment._arm(ArmSpec("stock again", CONFIG))
        (spare,) = experiment.spares
        experiment.end_repeat()
        assert ended(repeat) and not ended(spare)
    assert ended(spare)


def test_where_arms_are_gated_side_by_side_each_finds_a_spare(experiment, monkeypatch):
    """From the second batch on; the log of each is a file of its own."""
    monkeypatch.setattr(experiment, "_collect_early", lambda spec: taken.append(experiment._arm(spec)))
    with experiment:
        for batch in (("a", "b"), ("c", "d")):
            taken, before = [], list(experiment.spares)
            experiment.collect([ArmSpec(name, CONFIG) for name in batch])
            assert len(experiment.spares) == 2 and [arm for arm in taken if arm in before] == taken[: len(before)]
            assert len({arm.log for arm in (*taken, *experiment.spares)}) == 4
            for arm in taken:
                arm.end(1)
        spares = list(experiment.spares)
        assert len(before) == 2 and not any(ended(spare) for spare in spares)
    assert all(ended(spare) for spare in spares)


def test_a_spare_that_is_gone_fails_the_arm_that_takes_it_and_no_other(experiment):
    with experiment:
        gone = experiment.spares[0]
        gone.process.kill()
        gone.process.wait()
        with (
            pytest.raises(ArmFailed, match=r"process of arm unlucky ended with code -9"),
            experiment._arm(ArmSpec("unlucky", CONFIG)) as arm,
        ):
            arm.build()
        with experiment._arm(ArmSpec("next", CONFIG)) as arm:
            assert arm.build() == {"pid": arm.process.pid}


def test_real_workers_that_are_still_importing_do_not_outlive_an_error(tmp_path, settings):
    with pytest.raises(ZeroDivisionError), Experiment(CONFIG, settings, tmp_path, dict(os.environ), silent) as experiment:
        arms = [experiment.reference_arm, experiment.spares[0]]
        assert not any(ended(arm) for arm in arms)
        raise ZeroDivisionError
    assert all(ended(arm) for arm in arms)


@pytest.mark.parametrize("parallel", [1, 2, 3])
def test_as_many_arms_work_together_as_settings_allow(parallel, experiment):
    """Answers come in the order of the tasks, whoever ends first."""
    experiment.settings = GateConfig(parallel=parallel)
    at_work, most, lock = [], [], threading.Lock()

    def task(index: int) -> int:
        with lock:
            at_work.append(index)
            most.append(len(at_work))
        time.sleep(0.05 * (3 - index))
        at_work.remove(index)
        return index

    assert experiment._together(*(lambda index=index: task(index) for index in range(3))) == [0, 1, 2]
    assert max(most) == parallel


@pytest.mark.parametrize("parallel", [1, 3])
def test_an_error_of_one_of_them_is_raised(parallel, experiment):
    experiment.settings = GateConfig(parallel=parallel)
    with pytest.raises(ZeroDivisionError):
        experiment._together(lambda: 1, lambda: 1 // 0, lambda: 2)
