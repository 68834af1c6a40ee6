"""Peers as arms: which there are, what a record of one may hold, and that whatever becomes of one is a record."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from abtest.arm import Arm, ArmFailed, ArmSpec
from abtest.evidence import Evidence
from abtest.experiment import Candidate
from abtest.progress import GateProgress
from abtest.verdict import Check, Level, Verdict
from abtest.waiting import Waiting
from bench import measure, records, report
from bench.ceilings import Ceilings
from bench.command import Command, recipe_of
from bench.peers import PEERS, Peer, find
from bench.plan import plan_arms
from bench.report.shipping import decide
from kernels import registry
from loop.config import Config, DataConfig, LoraConfig
from loop.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
CONFIG = Config(
    model="qwen3-shallow-tiny", steps=4, device="cpu", dtype="float32", repeatable_attention=True,
    lora=LoraConfig(rank=4, alpha=8.0), data=DataConfig(pack_length=192),
)  # fmt: skip
LEAK = "editing documents outside the loss leaves the micro-step unchanged"
FAILED = Verdict(Level.FAILED, f"{LEAK}: no", (Check(LEAK, None, None, False, "", 5),))
PERF = records.Perf(9.0, 8.0, 4.0, 1.0, 3.0, 2.9, 3.1, 2, 2**30)


# Which arms there are


def names(*asked: str) -> list[str]:
    return [plan.name for plan in plan_arms(asked, CONFIG, CPU)]


def test_all_are_the_optimizations_and_peers_come_when_they_are_asked_for():
    peers = [peer.name for peer in PEERS]
    assert len(peers) == len(set(peers)) and not set(peers) & set(registry.discover())
    assert not set(names("all")) & set(peers)
    assert names("peers") == peers and names("all", "peers") == names("all") + peers
    assert names("unsloth", "static_lora") == ["unsloth", "static_lora"]
    with pytest.raises(UserError, match=r"--arms nobody: no such arm; there are all, peers, negative, .*transformers_peft"):
        names("nobody")


def test_the_flag_is_no_part_of_the_recipe():
    assert recipe_of(Command(peers=True), "float32") == recipe_of(Command(), "float32")


def test_a_peer_s_plan_says_which_process_and_which_versions():
    plans = {plan.name: plan for plan in plan_arms(["peers"], CONFIG, GPU)}
    for peer in PEERS:
        plan = plans[peer.name]
        assert plan.role == "peer" and plan.optimizations == () and plan.untimed is None
        assert plan.worker == ("bench.peers.worker", peer.name)
        assert plan.config == dataclasses.replace(CONFIG, gradient_checkpointing=peer.checkpointing)
        assert dict(plan.versions)["torch"] == importlib.metadata.version("torch")
        assert (ROOT / "bench/peers" / f"{peer.module}.py").is_file()
    assert plans["transformers_peft"].missing is None and plans["transformers_peft_compile"].missing is None
    assert not measure.goes_beside(plans["transformers_peft"], Command(gate=dataclasses.replace(Command().gate, parallel=4)))


def test_what_is_not_there_is_said_in_words():
    absent = Peer("p", "", "p", packages=("torch", "no_such_package"))
    assert absent.missing(GPU) == "needs the package no_such_package, which is not installed"
    assert Peer("p", "", "p").missing(CPU) == "needs a CUDA device; this run is on cpu"
    assert Peer("p", "", "p", needs_cuda=False, packages=("torch",)).missing(CPU) is None
    assert "no-such-package" not in Peer("p", "", "p", distributions=("no-such-package",)).versions()


# What a record may hold


def record(role: str = "peer", verdict: Verdict = FAILED, perf: records.Perf | None = PERF, **changes) -> records.Record:
    peer = {"versions": {"torch": "2"}, "took": {"bound": {"rule": "fla.rule"}}, "kernels": {"a|kernel": 3}}
    values = {
        "run_id": "r", "arm": "fast", "role": role, "optimizations": (), "verdict": verdict, "summary": "what it is",
        "exactness": "rounding", "why_exact": "", "environment": {"device": "Box", "device_slug": "box", "peer": peer},
        "recipe": {"model": "qwen3-shallow-tiny"}, "data": {}, "command": "python -m bench.run --peers",
        "finished_at": "2026-01-01T00:00:00Z", "losses": (1.0,), "reference_losses": (1.0,), "noise_sigma": (0.1,),
        "perf": perf,
    }  # fmt: skip
    return records.Record(**(values | changes))


def test_a_peer_s_time_may_stand_beside_a_failed_verdict_and_nobody_else_s():
    kept = record()
    assert records.from_json(records.to_json(kept)) == kept
    for level in (Level.FAILED, Level.INVALID, Level.APPROX):
        assert record(verdict=Verdict(level, "so it is")).perf == PERF
        for role in ("optimization", "negative", "combination", "reference", "repeat"):
            with pytest.raises(ValueError, match="what did not pass its gate holds no time"):
                record(role, Verdict(level, "so it is"))
    with pytest.raises(ValueError, match="holds no time"):
        record(verdict=Verdict(Level.NOT_RUN, "needs fla"))
    line = (
        records.to_json(kept)
        .replace('"role": "peer"', '"role": "optimization"')
        .replace('"role":"peer"', '"role":"optimization"')
    )
    with pytest.raises(ValueError, match="holds no time"):
        records.from_json(line)


def test_reports_show_a_peer_s_verdict_beside_its_time_and_never_ship_it(tmp_path):
    passed = Verdict(Level.BITWISE, "the same bits")
    stock = record("reference", passed, dataclasses.replace(PERF, ratio=1.0, ratio_low=1.0, ratio_high=1.0), arm="stock")
    path = tmp_path / "data" / "box" / "records.jsonl"
    path.parent.mkdir(parents=True)
    for one in (stock, record()):
        records.append(path, one)
    report.render(tmp_path / "data", tmp_path)
    page, arm = ((tmp_path / "box" / name).read_text(encoding="utf-8") for name in ("README.md", "fast.md"))
    rows = [line for line in page.splitlines() if line.startswith("| [`fast`]")]
    assert len(rows) == 2 and "| peer | FAILED | 3.00x [2.90, 3.10] |" in rows[0] and "(peer, FAILED)" in rows[1]
    assert "is never timed. A peer is all the same" in page and "fla.rule" not in page
    assert "fla.rule" in arm and "`a|kernel`" in arm.replace("\\|", "|") and "no time to ship by" in arm
    assert "Ships here: no: a peer, for comparison only" in arm
    assert decide([stock, record()]).enable == ()
    records.append(
        path, record(verdict=Verdict(Level.NOT_RUN, "needs fla"), perf=None, run_id="s", finished_at="2026-01-02T00:00:00Z")
    )
    report.render(tmp_path / "data", tmp_path)
    assert "A peer is all the same" not in (tmp_path / "box" / "README.md").read_text(encoding="utf-8")


# Whatever becomes of a peer is a record


def test_a_process_started_ahead_makes_way_and_a_mistake_in_a_peer_ends_only_its_arm(tmp_path):
    wrong = dataclasses.replace(CONFIG, lora=dataclasses.replace(CONFIG.lora, targets=("nowhere",)))
    spec = ArmSpec("transformers_peft", CONFIG, worker=find("transformers_peft").worker)
    with Arm(ArmSpec("spare", CONFIG), tmp_path, ENVIRONMENT) as arm:
        before, arm.spec = arm.process, spec
        assert arm.build()["peer"]["attention"] == "sdpa" and before.poll() is not None and arm.process is not before
        same = arm.process
        arm.spec = dataclasses.replace(spec, config=wrong)
        with pytest.raises(
            ArmFailed, match=r"^build: UserError: lora\.targets \['nowhere'\] match no projection"
        ) as failure:
            arm.build()
        assert failure.value.command == "build" and arm.process is same
    assert "in build" in failure.value.output  # how the traceback ends


def test_a_peer_that_finds_no_memory_says_so_as_every_arm_does(tmp_path):
    """It may have been others who held it, and then it is asked again."""
    code = """
import io, json, sys, torch
from abtest import worker
from bench.peers.worker import PeerWorker
from bench.peers import find
def fails(self, config): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB. Process 7 has 9 GiB.")
PeerWorker.ahead = fails
sys.stdin = io.StringIO(json.dumps({"command": "ahead", "config": {}}))
worker.main(lambda answers: PeerWorker(answers, find("transformers_peft")), ())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
    )
    assert json.loads(done.stdout) == {"failed": "out of memory in ahead: CUDA out of memory. Tried to allocate 3 GiB"}


def test_a_peer_that_never_comes_back_is_ended_with_a_line():
    code = "import time\nfrom bench.peers.worker import within\nwith within(0.2, 'warming up x'): time.sleep(60)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "warming up x took more than 0.2 s"


BUILT = {"data": {}, "paths": {"attention": "sdpa"}, "peer": {"bound": {"rule": "fla.rule"}}, "refused": {}}


@pytest.fixture
def bench(tmp_path, monkeypatch) -> measure.Bench:
    """A run whose peer leaks and whose clock gives PERF."""
    evidence = Evidence(BUILT, {"loss": [2.0, 1.0]}, work={"kernels": {"gemm": 2, "chunk_fwd": 18}})
    candidate = Candidate(contextlib.nullcontext(SimpleNamespace()), FAILED, evidence)
    experiment = SimpleNamespace(
        reference=evidence, sigma=(0.1, 0.1), reference_arm=None, gate_arm=lambda spec, claim: candidate, folder=tmp_path,
        environment=ENVIRONMENT, waiting=Waiting(), without_reference=contextlib.nullcontext,
    )  # fmt: skip
    monkeypatch.setattr(measure, "time_arms", lambda *arguments: PERF)
    facts = {"run_id": "r", "environment": {"device_slug": "box"}, "recipe": {}, "data": {}, "command": "c"}
    command = Command(reports=tmp_path, micro=False)
    return measure.Bench(command, GateProgress(10), experiment, Ceilings(1.0, 1.0, 1, 1, "float32"), facts)


def kept(bench: measure.Bench) -> records.Record:
    (found,) = records.read(bench.path)
    return found


def plan(name: str = "transformers_peft"):
    (found,) = plan_arms([name], CONFIG, CPU)
    return found


def test_a_peer_that_leaks_is_timed_all_the_same(bench):
    bench.arm(plan())
    found = kept(bench)
    assert found.verdict == FAILED and found.perf == PERF and found.untimed is None
    peer = found.environment["peer"]
    assert peer["took"] == BUILT["peer"] and list(peer["kernels"]) == ["chunk_fwd", "gemm"] and "torch" in peer["versions"]


class Process:
    """Stands in for an arm's process that is started beside the gate's own."""

    def __init__(self, spec, folder, environment) -> None:
        assert self.expected(spec)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        pass

    def build(self) -> dict:
        return BUILT


class Again(Process):
    """What passed is built once more in it."""

    def expected(self, spec) -> bool:
        return (spec.name, spec.optimizations) == ("combination once more", ("packed_attention", "static_lora"))


def raced(best) -> records.Race:
    return records.Race(best.arm, best.optimizations, 2, 1, 3, 4)


def passed(bench: measure.Bench, arm: str, ratio: float, **changes) -> None:
    values = {"role": "combination", "optimizations": ("packed_attention", "static_lora")} | changes
    level = values.pop("level", Level.ROUNDING)
    perf = dataclasses.replace(PERF, ratio=ratio) if level.lossless else None
    record = records.Record(
        arm=arm, verdict=Verdict(level, "so it is"), summary="", exactness="rounding", why_exact="",
        finished_at="2026-01-01", perf=perf, **(bench.facts | values),
    )  # fmt: skip
    records.append(bench.path, record)


def test_a_peer_is_timed_in_turn_with_the_fastest_that_passed(bench, monkeypatch):
    passed(bench, "slower", 1.5, role="optimization", optimizations=("slower",))
    passed(bench, "combination", 3.0)
    passed(bench, "of another run", 9.0, run_id="other")
    passed(bench, "beside its own stock", 9.0, recipe={"data": {"rows": "padded"}})
    passed(bench, "wrong", 9.0, level=Level.FAILED)
    monkeypatch.setattr(measure, "Arm", Again)
    monkeypatch.setattr(measure, "race", lambda peer, other, best, timing: raced(best))
    bench.arm(plan())
    *_, found = records.read(bench.path)
    assert found.race == records.Race("combination", ("packed_attention", "static_lora"), 2, 1, 3, 4)


@pytest.mark.parametrize("fails", [False, True])
def test_the_reference_rests_while_a_peer_is_in_turn_with_another(bench, monkeypatch, fails):
    order: list[str] = []

    @contextlib.contextmanager
    def without_reference():
        order.append("rests")
        try:
            yield
        finally:
            order.append("is back")

    def build(self) -> dict:
        order.append("built")
        if fails:
            raise ArmFailed("out of memory")
        return BUILT

    passed(bench, "combination", 3.0)
    monkeypatch.setattr(bench.experiment, "without_reference", without_reference)
    monkeypatch.setattr(measure, "Arm", Again)
    monkeypatch.setattr(Again, "build", build)
    monkeypatch.setattr(measure, "race", lambda peer, other, best, timing: order.append("raced") or raced(best))
    bench.arm(plan())
    assert order == ["rests", "built", *([] if fails else ["raced"]), "is back"]


def test_where_nothing_passed_or_it_cannot_be_built_again_there_is_no_race(bench, monkeypatch):
    def fails(self) -> dict:
        raise ArmFailed("out of memory")

    monkeypatch.setattr(measure, "Arm", None)
    passed(bench, "wrong", 9.0, level=Level.FAILED)
    bench.arm(plan())
    monkeypatch.setattr(measure, "Arm", Again)
    monkeypatch.setattr(Again, "build", fails)
    passed(bench, "combination", 3.0)
    bench.arm(plan("transformers_peft"))
    _, first, _, second = records.read(bench.path)
    assert first.race is second.race is None and first.perf == second.perf == PERF


def test_an_optimization_that_fails_is_not_timed_and_says_nothing_of_peers(bench):
    (own,) = plan_arms(["static_lora"], CONFIG, CPU)
    bench.arm(own)
    assert kept(bench).perf is None and "peer" not in kept(bench).environment


def ends(command: str):
    def gate(spec, claim):
        error = ArmFailed(f"{command}: RuntimeError: out of paper", "many\nlines")
        error.command = command
        raise error

    return gate


class Second(Process):
    """A peer is timed in it when its first did not get through the gate."""

    def expected(self, spec) -> bool:
        return spec.worker == ("bench.peers.worker", "transformers_peft")


def test_a_peer_that_breaks_in_the_gate_is_timed_in_a_second_process(bench, monkeypatch):
    bench.experiment.gate_arm = ends("structure")
    monkeypatch.setattr(measure, "Arm", Second)
    bench.arm(plan())
    found = kept(bench)
    assert found.verdict == Verdict(Level.FAILED, "structure: RuntimeError: out of paper") and found.perf == PERF
    assert found.environment["peer"]["took"] == BUILT["peer"]


def test_a_peer_whose_second_process_fails_too_is_a_record_without_a_time(bench, monkeypatch):
    def fails(self) -> dict:
        raise ArmFailed("build: RuntimeError: no paper at all")

    bench.experiment.gate_arm = ends("gradients")
    monkeypatch.setattr(measure, "Arm", Second)
    monkeypatch.setattr(Second, "build", fails)
    bench.arm(plan())
    assert kept(bench).perf is None
    assert kept(bench).untimed == "its second process failed, too: build: RuntimeError: no paper at all"


def test_a_peer_that_cannot_be_built_is_a_record_in_one_line(bench, monkeypatch):
    bench.experiment.gate_arm = ends("build")
    monkeypatch.setattr(measure, "Arm", None)
    bench.arm(plan())
    found = kept(bench)
    assert found.verdict == Verdict(Level.FAILED, "build: RuntimeError: out of paper") and found.perf is None
    assert "torch" in found.environment["peer"]["versions"]
