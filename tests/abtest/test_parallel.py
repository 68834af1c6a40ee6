"""Arms that work side by side: the same evidence as one after the other, and nobody waits for ever."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from unittest.mock import MagicMock

import pytest
import torch
from tiny import CONFIG as TINY

from abtest import experiment as experiment_module
from abtest import replicas, sensitivity
from abtest.arm import ArmFailed, ArmSpec
from abtest.evidence import Evidence
from abtest.experiment import Experiment
from abtest.in_process import InProcessExperiment
from abtest.mps import PIPE, PRIORITY
from abtest.settings import GateConfig
from abtest.verdict import Level
from kernels.contract import Exactness
from loop.config import DataConfig, LoraConfig

CONFIG = dataclasses.replace(
    TINY, model="qwen3-shallow-tiny", steps=3, grad_accum=1, data=DataConfig(pack_length=64), gradient_checkpointing=True,
    lora=LoraConfig(rank=16, alpha=8.0),  # with which the overfit state is reached in half the steps that it takes with 4
)  # fmt: skip
SETTINGS = GateConfig(steps=3, replicas=2, probes=3, repeats=2)
FIRST = ArmSpec("keep_activations", CONFIG, ("keep_activations",))


def silent(arm: str, phase: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture
def settings(tmp_path) -> GateConfig:
    return dataclasses.replace(SETTINGS, oracle_cache=tmp_path / "oracle")


@pytest.fixture
def experiment(tmp_path, settings):
    """Its folder is a fresh one, and its arms are processes, four at a time."""
    (tmp_path / "gate").mkdir()
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    with Experiment(CONFIG, dataclasses.replace(settings, parallel=4), tmp_path / "gate", environment, silent) as made:
        yield made


BUILT: dict = {"weights": "a", "frozen": "b", "state_bytes": 0, "device_bytes": 0, "refused": {}}


@pytest.fixture
def unmanned(tmp_path, settings, monkeypatch):
    """The same without processes: arms that answer nothing, but for what they begin with."""
    arms = MagicMock(return_value=MagicMock(build=MagicMock(side_effect=lambda: dict(BUILT))))
    arms.return_value.__enter__.return_value = arms.return_value
    monkeypatch.setattr(experiment_module, "Arm", arms)
    monkeypatch.setitem(BUILT, "state_bytes", 0)
    return Experiment(CONFIG, dataclasses.replace(settings, parallel=4), tmp_path, {}, silent)


def test_the_first_arm_beside_the_reference_gets_the_verdict_it_gets_alone(experiment, settings, tmp_path, one_thread):
    experiment.prepare(FIRST, timed=False)
    assert experiment.repeat_arm is None
    assert list(experiment.early) == [FIRST]
    beside = experiment.gate_arm(FIRST, Exactness.BITWISE)
    assert not experiment.early and beside.arm.process.poll() is None
    beside.arm.__exit__(None, None, None)
    (tmp_path / "alone").mkdir()
    with InProcessExperiment(CONFIG, settings, tmp_path / "alone", {}, silent) as one_by_one:
        one_by_one.prepare(FIRST)
        assert not one_by_one.early
        alone = one_by_one.gate_arm(FIRST, Exactness.BITWISE)
    assert beside.verdict.level is alone.verdict.level is Level.BITWISE
    assert [(c.name, c.state, c.passed) for c in beside.verdict.checks] == [
        (c.name, c.state, c.passed) for c in alone.verdict.checks
    ]
    assert beside.evidence.losses == alone.evidence.losses and experiment.sigma == one_by_one.sigma
    assert experiment.calls["stock: overfit"] > 0 and experiment.calls["keep_activations: gradients"] > 0


def test_an_arm_that_ends_early_is_told_of_when_it_is_gated(experiment, monkeypatch):
    def ends(arm, *arguments, **named):
        raise ArmFailed("it ended")

    monkeypatch.setattr(experiment, "_free_run", ends)
    experiment.trained.set()  # the reference is through
    experiment._collect_early(FIRST)
    process = experiment.early[FIRST].arm.process
    assert process.poll() is None
    with pytest.raises(ArmFailed, match="it ended"):
        experiment.gate_arm(FIRST, Exactness.ROUNDING)
    assert not experiment.early and process.poll() is not None


def test_a_reference_that_cannot_learn_by_heart_keeps_nobody_waiting(unmanned, monkeypatch):
    """Neither the oracle, which waits for the overfit state's weights, nor the arm that is gated first, which waits for the
    oracle to end and then for what the reference did."""
    waiting = threading.Semaphore(0)

    def by_heart(*arguments, **named):
        waiting.release()
        return threading.Event.wait(unmanned.memorised_by_heart)

    def fails(command, *arguments, **named):
        if command == "overfit":
            assert waiting.acquire(timeout=60)
            raise ArmFailed("out of memory")
        return MagicMock()

    monkeypatch.setattr(unmanned.memorised_by_heart, "wait", by_heart)
    monkeypatch.setattr(unmanned.reference_arm, "call", fails)
    monkeypatch.setattr(unmanned, "_reference_gradients", lambda state: {})
    with pytest.raises(ArmFailed, match="out of memory"):
        unmanned.prepare(FIRST)
    assert unmanned.exact_through.is_set() and list(unmanned.early) == [FIRST]


def test_what_failed_first_is_raised(unmanned):
    """Later ones may only be its consequence, whatever the order in which they were asked for."""
    failed = threading.Event()

    def cause():
        failed.set()
        raise ArmFailed("out of memory")

    def consequence():
        failed.wait()
        time.sleep(0.2)
        raise ArmFailed("ended with code 0")

    with pytest.raises(ArmFailed, match="out of memory"):
        unmanned._together(consequence, cause)
    assert unmanned._together(lambda: 1, lambda: 2) == [1, 2]


def test_an_oracle_of_other_weights_is_none(unmanned, monkeypatch):
    """As random weights drawn on a GPU of which a process sees a part are."""
    monkeypatch.setattr(unmanned.truths, "build", lambda: BUILT | {"frozen": "other"})
    with pytest.raises(ArmFailed, match="the oracle does not begin with the same weights as stock"):
        unmanned.prepare(FIRST)


def test_the_others_stand_behind_the_oracle(unmanned):
    """Its process is its own: a priority is settled when a process starts, and the spare one started with a low one."""
    asked = experiment_module.Arm
    unmanned.environment = {PIPE: "a service"}
    unmanned._arm(ArmSpec("one", CONFIG))
    unmanned.truths.build()
    unmanned._arm(ArmSpec("next", CONFIG))
    environments = {call.args[0].name: call.args[2] for call in asked.call_args_list}
    assert PRIORITY not in environments["oracle"] and environments["after one, 1"] == {PIPE: "a service", PRIORITY: "1"}


@pytest.mark.parametrize("hurried", [False, True])
def test_a_reference_that_all_wait_for_and_nobody_times_stands_beside_the_oracle(hurried, settings, tmp_path, monkeypatch):
    arms = MagicMock()
    monkeypatch.setattr(experiment_module, "Arm", arms)
    Experiment(CONFIG, settings, tmp_path, {PIPE: "a service"}, silent, hurried=hurried)
    environments = {call.args[0].name: call.args[2] for call in arms.call_args_list}
    assert (PRIORITY in environments["stock"]) != hurried


def test_without_the_service_the_spare_process_becomes_the_oracle(unmanned):
    (spare,) = unmanned.spares
    unmanned.truths.build()
    assert unmanned.truths.arm is spare
    assert [call.args[2] for call in experiment_module.Arm.call_args_list] == [{}] * experiment_module.Arm.call_count


def test_where_optimizers_are_large_arms_take_turns(unmanned, monkeypatch):
    active, most = [], []

    def task(*arguments) -> dict:
        active.append(1)
        most.append(len(active))
        time.sleep(0.05)
        active.pop()
        return {}

    for name in ("_exact", "_repeat"):
        monkeypatch.setattr(unmanned, name, task)
    monkeypatch.setattr(unmanned, "_reference_evidence", lambda build: task() or Evidence(build, {"loss": [1.0]}))
    for name in ("_replicas", "_more_replicas", "_collect_early"):
        monkeypatch.setattr(unmanned, name, task)
    unmanned.exact_through.set()
    unmanned.kicked[0] = [1.0]
    unmanned.seeds.clear()
    BUILT["state_bytes"] = experiment_module.RESYNC_BYTES + 1
    unmanned.prepare(FIRST)
    assert unmanned.crowded and not unmanned.resync and most == [1, 1, 1, 1], "and the first arm comes later"
    BUILT["state_bytes"] = experiment_module.RESYNC_BYTES
    unmanned.prepare(FIRST)
    assert not unmanned.crowded and unmanned.resync and len(most) == 10 and max(most) > 1


H200, STATE = 140 << 30, 21 << 30  # and what full fine-tuning holds at 2B


@pytest.mark.parametrize(
    ("parallel", "state", "device", "abreast"),
    [
        (4, 1 << 30, 0, 4),  # small: as many as settings say, whatever the device
        (4, STATE, H200, 2),
        (1, STATE, H200, 1),
        (4, STATE, H200 // 2, 1),  # one is always tried
        (4, STATE, 0, 1),  # a CPU's memory is not its own
        (9, STATE // 2, H200, 4),
        (4, 0, 0, 4),  # nothing trains
    ],
)
def test_as_many_large_arms_are_abreast_as_the_device_holds(unmanned, parallel, state, device, abreast):
    unmanned.settings = dataclasses.replace(unmanned.settings, parallel=parallel)
    unmanned.crowded = state > experiment_module.RESYNC_BYTES
    assert unmanned._abreast({"state_bytes": state, "device_bytes": device}) == abreast


def at_once(unmanned, monkeypatch, count: int) -> tuple[list[str], int]:
    """Which of `count` arms are collected together, with what the reference is asked for, and how many at a time."""
    done, active, most = [], [], [0]

    def collect(spec: ArmSpec) -> None:
        active.append(spec)
        most[0] = max(most[0], len(active))
        time.sleep(0.05)
        active.remove(spec)
        done.append(spec.name)

    monkeypatch.setattr(unmanned, "_collect_early", collect)
    monkeypatch.setattr(unmanned, "reference_arm", MagicMock(call=done.append))
    unmanned.collect([ArmSpec(f"arm {n}", CONFIG) for n in range(count)])
    return done, most[0]


def test_large_arms_are_collected_side_by_side_while_the_reference_rests(unmanned, monkeypatch):
    unmanned.crowded, unmanned.abreast = True, 2
    done, most = at_once(unmanned, monkeypatch, 3)
    assert (done[0], sorted(done[1:-1]), done[-1], most) == ("rest", ["arm 0", "arm 1"], "resume", 2)


def test_large_arms_gated_side_by_side_get_verdicts_and_can_be_timed(experiment, monkeypatch):
    """In real processes, as if their optimizers were large."""
    monkeypatch.setattr(experiment_module, "RESYNC_BYTES", 0)
    experiment.prepare(timed=False)
    assert experiment.crowded and experiment.abreast == 1, "a CPU has no memory of its own"
    experiment.abreast = 2
    specs = [FIRST, ArmSpec("static_lora", CONFIG, ("static_lora",))]
    experiment.collect(specs)
    assert set(experiment.early) == set(specs)
    for spec in specs:
        candidate = experiment.gate_arm(spec, Exactness.BITWISE)
        with candidate.arm:
            assert candidate.verdict.level is Level.BITWISE, candidate.verdict.reason
            for arm in (experiment.reference_arm, candidate.arm):
                arm.call("prepare_timing", micro_batches=1, warmup=1)
                assert arm.call("time_block")["seconds"] > 0


def test_where_one_large_arm_fits_nothing_is_collected_ahead_of_its_turn(unmanned, monkeypatch):
    unmanned.crowded, unmanned.abreast = True, 1
    assert at_once(unmanned, monkeypatch, 2) == ([], 0)


def test_small_arms_are_collected_beside_the_reference(unmanned, monkeypatch):
    done, most = at_once(unmanned, monkeypatch, 3)
    assert sorted(done) == ["arm 0", "arm 1", "arm 2"] and most == 3


def test_large_arms_that_end_side_by_side_leave_the_reference_at_work(unmanned, monkeypatch):
    """Whatever ended them: it is timed beside the next."""
    asked: list[str] = []
    unmanned.crowded, unmanned.abreast = True, 2
    monkeypatch.setattr(unmanned, "_collect_early", MagicMock(side_effect=ArmFailed("ended")))
    monkeypatch.setattr(unmanned, "reference_arm", MagicMock(call=asked.append))
    with pytest.raises(ArmFailed, match="ended"):
        unmanned.collect([FIRST, ArmSpec("another", CONFIG)])
    assert asked == ["rest", "resume"]


@pytest.mark.parametrize("through", [(), ("exact_through",), ("reference_through",), ("exact_through", "reference_through")])
@pytest.mark.parametrize(("device", "process", "obstacle"), [
    ("cpu", "replicas", None), ("cpu", "more replicas", "hungry"), ("cuda", "replicas", None),
    ("cuda", "replicas", "crowded"), ("cuda", "replicas", "hungry"), ("cuda", "more replicas", None),
])  # fmt: skip
def test_replicas_recompute_nothing_where_memory_is_not_scarce(device, process, obstacle, through, unmanned, monkeypatch):
    """On a CPU; and on a GPU the first process, once oracle and reference have left theirs."""
    asked = []
    monkeypatch.setattr(unmanned, "_replica", lambda arm, seed, kept: asked.append(kept) or [1.0])
    monkeypatch.setattr(replicas, "resolve_device", lambda config: (torch.device(device), torch.float32))
    for name in ("trained", *through):
        getattr(unmanned, name).set()
    if obstacle is not None:
        setattr(unmanned, obstacle, True)
    unmanned._replicas(process)
    room = len(through) == 2 and process == "replicas" and obstacle is None
    assert asked == [device == "cpu" or room] * unmanned.settings.replicas


@pytest.mark.parametrize(("names", "expected"), [(("silu_mul",), False), (("silu_mul", "cuda_graphs"), True)])
def test_replicas_leave_a_hungry_candidate_its_memory(names, expected, unmanned, monkeypatch):
    for name in ("_exact", "_repeat", "_collect_early", "_more_replicas", "_replicas"):
        monkeypatch.setattr(unmanned, name, lambda *arguments: {})
    monkeypatch.setattr(unmanned, "_reference_evidence", lambda build: Evidence(build, {"loss": [1.0]}))
    unmanned.kicked[0] = [1.0]
    unmanned.seeds.clear()
    unmanned.prepare(ArmSpec("one", CONFIG, names))
    assert unmanned.hungry is expected
    unmanned.prepare()
    assert not unmanned.hungry, "there is none beside the reference"


@pytest.mark.parametrize("process", ["replicas", "more replicas"])
def test_two_processes_share_the_replicas_and_what_one_fails_at_is_made_up_for(process, unmanned, monkeypatch):
    """One of them ends at a replica. That is the end if it is the first; of the second, the first takes over what is left.
    Each seed is run to its end at most once."""
    unmanned.settings = dataclasses.replace(unmanned.settings, replicas=6)
    unmanned.seeds.extend(range(len(unmanned.seeds), 6))
    ended, runs = [], []

    def replicas(name="replicas", own=unmanned._replicas):
        here.name = name
        own(name)

    def run(arm, seed, kept):
        time.sleep(0.02)
        if here.name == process and not ended:
            ended.append(seed)
            raise ArmFailed("out of memory")
        runs.append(seed)
        return [float(seed)]

    here = threading.local()
    monkeypatch.setattr(unmanned, "_replicas", replicas)
    monkeypatch.setattr(unmanned, "_replica", run)
    for through in (unmanned.trained, unmanned.exact_through, unmanned.reference_through):
        through.set()
    if process == "replicas":
        with pytest.raises(ArmFailed, match="out of memory"):
            unmanned._together(unmanned._replicas, unmanned._more_replicas)
    else:
        unmanned._together(unmanned._replicas, unmanned._more_replicas)
        assert sorted([*runs, *unmanned.seeds]) == list(range(6))
        unmanned._replicas()  # what the second ended at last
        assert unmanned.kicked == {seed: [float(seed)] for seed in range(6)}
    assert len(ended) == 1 and len(set(runs)) == len(runs)


def test_a_replica_that_nobody_finished_is_run_before_the_noise_is_told(unmanned, monkeypatch):
    def ends_with_one_left(name="replicas"):
        if name == "more replicas":
            return
        while len(unmanned.seeds) > (0 if len(asked) else 1):
            seed = unmanned.seeds.popleft()
            unmanned.kicked[seed] = [float(seed)]
        asked.append(name)

    asked = []
    monkeypatch.setattr(unmanned, "_replicas", ends_with_one_left)
    monkeypatch.setattr(unmanned, "_exact", lambda: unmanned.exact_through.set())
    monkeypatch.setattr(unmanned, "_repeat", lambda build, timed: {})
    monkeypatch.setattr(unmanned, "_collect_early", lambda spec, traced: None)

    def reference(build):
        unmanned.trained.set()
        unmanned.reference_through.set()
        return Evidence(build, {"loss": [1.0]})

    monkeypatch.setattr(unmanned, "_reference_evidence", reference)
    unmanned.prepare(FIRST)
    assert asked == ["replicas", "replicas"] and len(unmanned.kicked) == unmanned.settings.replicas


@pytest.mark.parametrize(("message", "asked"), [("out of memory: CUDA out of memory", 2), ("it ended", 1)])
def test_an_arm_that_found_no_memory_beside_others_is_asked_again(message, asked, unmanned, monkeypatch):
    """When they are through. What it lacked then others had, which says nothing of the arm."""
    tried = []

    def collect(spec, traced=False):
        tried.append(MagicMock(built={"refused": {"it": "not here"}}))
        error = ArmFailed(message) if len(tried) == 1 else None
        return experiment_module._Collected(tried[-1], None, error, 0.0)

    monkeypatch.setattr(unmanned, "_collect", collect)
    unmanned._collect_early(FIRST)
    if asked == 1:
        with pytest.raises(ArmFailed, match=message):
            unmanned.gate_arm(FIRST, Exactness.ROUNDING)
    else:
        assert unmanned.gate_arm(FIRST, Exactness.ROUNDING).verdict.level is Level.NOT_RUN
    assert len(tried) == asked and tried[0].__exit__.called


def test_a_second_process_for_replicas_is_not_worth_its_start_at_the_end(unmanned, monkeypatch):
    monkeypatch.setattr(unmanned, "_replicas", MagicMock())
    for through in (unmanned.trained, unmanned.exact_through, unmanned.reference_through):
        through.set()
    unmanned.seeds.clear()
    unmanned.seeds.append(7)
    unmanned._more_replicas()
    unmanned._replicas.assert_not_called()


@pytest.mark.parametrize(
    ("roomy", "hungry", "waits"), [(True, False, True), (True, True, False), (False, False, False), (False, True, False)]
)
def test_a_second_process_for_replicas_waits_for_memory_that_the_first_takes(roomy, hungry, waits, unmanned, monkeypatch):
    """One that recomputes nothing takes what is left beside repeat and candidate."""
    arm = MagicMock(call=MagicMock(return_value={"loss": [1.0], "kept": False, "roomy": roomy}))
    assert unmanned._replica(arm, 0, kept=False) == [1.0]
    monkeypatch.setattr(unmanned, "_replicas", MagicMock())
    for through in (unmanned.trained, unmanned.exact_through, unmanned.reference_through):
        through.set()
    unmanned.hungry = hungry
    unmanned.seeds.extend(range(4))
    second = threading.Thread(target=unmanned._more_replicas)
    second.start()
    second.join(0.2)
    unmanned.repeat_through.set()
    second.join(0.2)
    assert second.is_alive() is waits and unmanned._replicas.called is not waits
    unmanned.first_through.set()
    second.join(10)
    assert unmanned._replicas.called and not second.is_alive()


def test_beside_a_second_process_the_first_recomputes_until_the_others_are_through(unmanned, monkeypatch):
    """A second one that began before anybody knew how large the device is."""
    monkeypatch.setattr(unmanned, "_replicas", MagicMock())
    for through in (unmanned.exact_through, unmanned.reference_through):
        through.set()
    assert unmanned._room()
    unmanned.seeds.extend(range(4))
    unmanned._more_replicas()
    assert not unmanned._room()
    unmanned.repeat_through.set()
    assert not unmanned._room()
    unmanned.first_through.set()
    assert unmanned._room()


@pytest.mark.parametrize("failing", [None, "_repeat", "_collect_early"])
def test_whoever_waits_for_repeat_and_candidate_goes_on_however_they_end(failing, unmanned, monkeypatch):
    def ends(*arguments, **named):
        raise ArmFailed("out of memory")

    def more():
        waited.append(unmanned.repeat_through.wait(10) and unmanned.first_through.wait(10))

    def reference(build):
        unmanned.trained.set()
        unmanned.reference_through.set()
        return Evidence(build, {"loss": [1.0]})

    waited = []
    monkeypatch.setattr(unmanned, "_replicas", lambda name="replicas": unmanned.kicked.update({0: [1.0], 1: [1.1]}))
    monkeypatch.setattr(unmanned, "_exact", lambda: unmanned.exact_through.set())
    monkeypatch.setattr(unmanned, "_repeat", lambda build, timed: {})
    monkeypatch.setattr(unmanned, "_collect_early", lambda spec, traced: None)
    monkeypatch.setattr(unmanned, "_more_replicas", more)
    monkeypatch.setattr(unmanned, "_reference_evidence", reference)
    unmanned.seeds.clear()
    if failing is None:
        unmanned.prepare(FIRST)
    else:
        monkeypatch.setattr(unmanned, failing, ends)
        with pytest.raises(ArmFailed, match="out of memory"):
            unmanned.prepare(FIRST)
    assert waited == [True]


@pytest.mark.parametrize(
    ("part", "failing"), [("_repeat", "_free_run"), ("_reference_evidence", "_train"), ("_reference_evidence", "_evidence")]
)
def test_an_arm_beside_a_reference_that_ends_is_told_so(part, failing, unmanned, monkeypatch):
    def ends(*arguments, **named):
        raise ArmFailed("out of memory")

    monkeypatch.setattr(unmanned, failing, ends)
    if part == "_repeat":
        unmanned.trained.set()
    unmanned.repeat_arm = MagicMock()
    with pytest.raises(ArmFailed, match="out of memory"):
        getattr(unmanned, part)({}, *([True] if part == "_repeat" else []))
    assert part == "_repeat" or unmanned.reference_through.is_set(), "a second process for replicas waits for it"
    awaited = unmanned.gradients_known.values() if part == "_repeat" else [unmanned.work_known]
    for known in awaited:
        with pytest.raises(ArmFailed, match="the reference ended"):
            known.result(timeout=5)


def test_the_repeat_asks_for_no_gradients_while_the_oracle_has_the_memory(unmanned, monkeypatch):
    """Nor does it train while the reference does, for which everybody waits."""
    trained = []
    monkeypatch.setattr(unmanned, "_free_run", lambda arm, resync: trained.append(now.is_set()) or {"loss": [1.0]})
    monkeypatch.setattr(unmanned, "_reference_gradients", lambda state: {"asked": unmanned.exact_through.is_set()})
    now = unmanned.trained
    unmanned.repeat_arm = MagicMock()
    for seconds, event in ((0.1, now), (0.3, unmanned.exact_through)):
        threading.Timer(seconds, event.set).start()
    answers = unmanned._repeat({}, timed=True)
    assert trained == [True]
    assert list(answers) == list(unmanned.states) and all(answer["asked"] for answer in answers.values())


def test_an_oracle_that_ends_keeps_nobody_waiting(unmanned, monkeypatch):
    def ends(states) -> None:
        raise ArmFailed("out of memory")

    monkeypatch.setattr(unmanned.truths, "prefetch", ends)
    with pytest.raises(ArmFailed, match="out of memory"):
        unmanned._exact()
    assert unmanned.exact_through.is_set()


@pytest.mark.parametrize(("named", "expected"), [("2,5", ("2", "5")), ("GPU-1", ("GPU-1",))])
def test_sensitivity_uses_the_gpus_that_it_is_shown(named, expected, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert sensitivity.gpus() == expected


def test_without_a_list_it_uses_all_there_are(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert sensitivity.gpus() == ("0", "1", "2")


def test_workers_share_gpus_by_turns(monkeypatch):
    turn, seen = multiprocessing.get_context("spawn").Value("i", 0), []
    for _ in range(5):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "untouched")
        sensitivity.take_gpu(turn, ("2", "5"))
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == ["2", "5", "2", "5", "2"]
    sensitivity.take_gpu(turn, ("7",))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"


POOL = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from abtest import sensitivity
context = multiprocessing.get_context("spawn")
pool = ProcessPoolExecutor(1, mp_context=context, initializer=sensitivity.begin_worker, initargs=(context.Value("i", 0), ()))
print(pool.submit(os.getpid).result(), flush=True)
pool.submit(time.sleep, 100).result()
"""


def test_workers_end_with_a_command_that_was_killed(gone):
    with subprocess.Popen([sys.executable, "-c", POOL], cwd=sensitivity.ROOT, stdout=subprocess.PIPE, text=True) as command:
        worker = int(command.stdout.readline())
        command.kill()
    assert gone(worker, 20)
