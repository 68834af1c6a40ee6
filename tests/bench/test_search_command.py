"""`python -m bench.search` as a user runs it: candidates, records, mistakes, going on, and one run with real processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from abtest.arm import ArmFailed
from abtest.command import gate_config
from abtest.evidence import Evidence
from abtest.experiment import Candidate
from abtest.verdict import Check, Level, Verdict
from abtest.waiting import Waiting
from bench import measure, records
from bench.ceilings import Ceilings
from bench.claims import Claims
from bench.command import recipe_of
from bench.records import Perf, Record
from bench.report import differences
from bench.search import __main__ as command
from bench.search import prove as proving
from bench.search import trials
from bench.search.candidates import candidates
from bench.search.command import default
from kernels import registry
from loop.cli import guarded, parse
from loop.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--device", "cpu", "--model", "qwen3-shallow-tiny", "--search.blocks", "2", "--search.most-blocks", "2"]
SPEED = {"static_lora": 1.3, "supervised_logits": 1.2, "packed_attention": 0.9}  # plain PyTorch: a CPU times them, too
EVIDENCE = Evidence({"data": {}, "paths": {}}, {"loss": [2.0, 1.0]})
PASSED = Verdict(Level.ROUNDING, "close", (Check("scale error", 0.001, 0.003, True, "q", 2, "step 0"),))
FAILED = Verdict(Level.FAILED, "apart", (Check("scale error", 0.1, 0.003, False, "q", 2, "step 0"),))


def perf(ratio: float) -> Perf:
    return Perf(9.0, 8.0, 4.0, 1.0, ratio, ratio - 0.01, ratio + 0.01, 2, 2**30)


class World:
    """Stands in for processes, gate, clock and git. Blocks take one second over the product of the speeds of what is on."""

    def __init__(self, reports: Path) -> None:
        self.reports, self.sha, self.dirty, self.verdict = reports, "abc1234", False, PASSED
        self.started: list[tuple[str, ...]] = []
        self.gated: list[tuple[str, ...]] = []
        self.fail = lambda on: None

    def __call__(self, *arguments: str) -> None:
        self.started, self.gated = [], []
        command.main([*FLAGS, *arguments, "--reports", str(self.reports)])

    @property
    def environment(self) -> dict:
        return {"device": "Box", "device_slug": "box", "git_sha": self.sha, "git_dirty": self.dirty, "dtype": "float32"}

    @property
    def file(self) -> Path:
        return self.reports / "data" / "box" / "records.jsonl"

    @property
    def trials(self) -> list[trials.Trial]:
        return trials.read(self.reports / "data" / "search" / "box.jsonl")

    def recipe(self, *flags: str) -> dict:
        words = [*FLAGS, *flags]
        return recipe_of(parse(default(words), "", "", words).bench, "float32")

    def keep(self, arm: str, role: str = "optimization", verdict: Verdict = PASSED, run_id: str = "r", **changes) -> None:
        """A record that `bench.run` left."""
        ratio = perf(SPEED.get(arm, 1.0)) if verdict.level.lossless else None
        values = {"perf": ratio, "recipe": self.recipe(), "optimizations": (arm,), "finished_at": "2026-01-02T03:04:05Z"}
        record = Record(
            run_id=run_id, arm=arm, role=role, verdict=verdict, summary="", exactness="rounding", why_exact="",
            environment=self.environment, data={}, command="python -m bench.run", **values | changes,
        )  # fmt: skip
        records.append(self.file, record)

    def keep_run(self, run_id: str = "r", arms=tuple(SPEED), **changes) -> None:
        self.keep("stock", "reference", Verdict(Level.BITWISE, ""), run_id, optimizations=(), **changes)
        for arm in arms:
            self.keep(arm, run_id=run_id, **changes)


class Process:
    def __init__(self, world: World, spec) -> None:
        self.world, self.spec = world, spec
        world.started.append(spec.optimizations)

    def __exit__(self, *error: object) -> None:
        self.ended = True

    def build(self) -> dict:
        return {"refused": {}}

    def call(self, asked: str, **arguments) -> dict:
        self.world.fail(self.spec.optimizations)
        if asked == "prepare_timing":
            return {"positions": 100, "real_tokens": 90, "supervised_tokens": 50}
        return {"seconds": 1 / math.prod(SPEED[name] for name in self.spec.optimizations)}


class Stage:
    """An experiment without processes."""

    def __init__(self, world: World) -> None:
        self.world, self.reference, self.repeat, self.sigma = world, EVIDENCE, EVIDENCE, (0.1, 0.1)
        self.reference_arm = self.repeat_arm = None
        self.early: dict = {}
        self.waiting = Waiting()

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *error: object) -> None:
        self.ended = True

    def prepare(self, first=None, timed: bool = True) -> None:
        self.prepared = True

    def repeat_verdict(self) -> Verdict:
        return Verdict(Level.BITWISE, "the same bits")

    def end_repeat(self) -> None:
        self.repeat_arm = None

    def gate_arm(self, spec, claim) -> Candidate:
        self.world.gated.append(spec.optimizations)
        if self.world.verdict is None:
            raise ArmFailed("the process ended with code 1")
        return Candidate(contextlib.nullcontext(), self.world.verdict, EVIDENCE)


@pytest.fixture
def world(tmp_path, monkeypatch) -> World:
    made = World(tmp_path / "reports")
    monkeypatch.setattr(command, "describe", lambda device: made.environment)
    monkeypatch.setattr(command, "Arm", lambda spec, folder, environment: Process(made, spec))
    monkeypatch.setattr(proving, "measure_ceilings", lambda device: Ceilings(1.0, 1.0, 1, 1, "float32"))
    monkeypatch.setattr(proving, "Experiment", lambda config, gate, folder, environment, progress: Stage(made))
    monkeypatch.setattr(measure, "time_arms", lambda *given: perf(1.5))
    monkeypatch.setattr(measure, "time_equals", lambda *given: (perf(1.0), perf(1.0)))
    return made


def last(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


BEST = ("static_lora", "supervised_logits")

# The answer


def test_the_answer_goes_through_the_gate_and_ships(world, capsys):
    world.keep_run()
    world.keep("combination", "combination", perf=perf(1.9), optimizations=tuple(sorted(SPEED)))
    world()
    found = last(capsys)
    assert found["search"]["optimizations"] == list(BEST) and found["search"]["finished"]
    assert found["search"]["left_out"]["static_lora"][0] == pytest.approx(1.3)
    record = records.read(world.file)[-1]
    assert (record.arm, record.role, record.optimizations, record.run_id) == ("search", "combination", BEST, "r")
    assert record.command.startswith("python -m bench.search --device cpu") and record.perf.ratio == 1.5
    assert world.gated == [BEST] and found["shipping"] == list(BEST), "although an earlier ratio to stock was higher"
    toml = (world.reports / "box" / "shipping.toml").read_text()
    assert 'enable = ["static_lora", "supervised_logits"]' in toml
    page = (world.reports / "box" / "README.md").read_text()
    assert "1.90x [1.89, 1.91], but the search timed sets of what passed in turn and found a faster one" in page
    assert differences(world.reports / "data", world.reports) == []
    assert "**`static_lora` + `supervised_logits`** is the fastest set" in (world.reports / "search/README.md").read_text()


def test_an_answer_that_fails_its_gate_leaves_what_shipped(world, capsys):
    world.keep_run()
    world.verdict = FAILED
    world()
    captured = capsys.readouterr()
    assert "FAILED: this set does not ship; what shipped before stays" in captured.err
    assert json.loads(captured.out)["shipping"] == ["static_lora"]
    assert records.read(world.file)[-1].verdict == FAILED


def test_where_stock_is_the_fastest_nothing_is_gated(world, capsys):
    world.keep_run(arms=("packed_attention",))
    world()
    captured = capsys.readouterr()
    assert "there is nothing to gate" in captured.err and world.gated == []
    assert json.loads(captured.out)["search"] == {"optimizations": [], "finished": True, "left_out": {}}


def test_a_search_among_some_names_competes_as_any_combination(world, capsys):
    world.keep_run()
    world.keep("combination", "combination", perf=perf(1.9), optimizations=tuple(sorted(SPEED)))
    world("--arms", "static_lora", "packed_attention")
    assert records.read(world.file)[-1].arm == "partial_search"
    assert last(capsys)["shipping"] == sorted(SPEED)
    assert {trial.candidates for trial in world.trials} == {("packed_attention", "static_lora")}


# Beginning with a set


ALL = tuple(sorted(SPEED))


def test_a_search_from_a_set_begins_there_and_competes_as_any_combination(world, capsys):
    world.keep_run()
    world.keep("combination", "combination", perf=perf(1.9), optimizations=ALL)
    world("--begin", "packed_attention", "static_lora")
    captured = capsys.readouterr()
    assert "it begins with packed_attention + static_lora" in captured.err.splitlines()
    assert world.started[0] == ("packed_attention", "static_lora") and () not in world.started
    assert world.trials[0].against == ("packed_attention", "static_lora") and world.trials[0].stage == "forward"
    found = json.loads(captured.out)
    assert found["search"]["optimizations"] == list(BEST) and found["search"]["finished"] and world.gated == [BEST]
    assert records.read(world.file)[-1].arm == "partial_search"
    assert found["shipping"] == list(ALL), "its ratio to stock is higher, and the search began elsewhere"


def test_a_set_that_has_its_record_as_a_combination_is_not_gated_again(world, capsys):
    world.keep_run()
    world.keep("combination", "combination", perf=perf(1.4), optimizations=("supervised_logits", "static_lora"))
    before = world.file.read_bytes()
    world("--begin", "static_lora+supervised_logits")
    captured = capsys.readouterr()
    assert "static_lora + supervised_logits is the answer; run r has its record" in captured.err
    assert world.gated == [] and world.file.read_bytes() == before
    searched = json.loads(captured.out)["search"]
    assert searched["finished"] and set(searched["left_out"]) == set(BEST)
    assert json.loads(captured.out)["shipping"] == list(reversed(BEST))


@pytest.mark.parametrize("had", [("static_lora",), ALL])
def test_a_larger_or_smaller_set_than_the_recorded_one_is_gated(world, had):
    world.keep_run()
    world.keep("combination", "combination", perf=perf(1.4), optimizations=had)
    world("--begin", *had)
    assert world.gated == [BEST] and records.read(world.file)[-1].arm == "partial_search"
    world("--begin", *had)
    assert world.gated == world.started == []


def test_a_search_from_stock_gates_its_answer_as_such_whatever_else_has_a_record(world, capsys):
    world.keep_run()
    world.keep("combination", "combination", perf=perf(1.4), optimizations=BEST)
    world()
    assert world.gated == [BEST] and records.read(world.file)[-1].arm == "search"
    assert last(capsys)["shipping"] == list(BEST)
    world("--begin", *BEST)
    assert world.gated == world.started == [], "the search's record is one of that set, too"


@pytest.mark.parametrize(
    ("kept", "whole", "partial"),
    [
        ([("combination", BEST)], False, True),
        ([("partial_search", BEST)], False, True),
        ([("search", BEST)], True, True),
        ([("combination", ALL)], False, False),
        ([("combination", BEST), ("combination", ALL)], False, False),  # the newer one counts
        ([("combination", BEST), ("partial_search", ALL)], False, True),
        ([("combination", BEST), ("search", ALL)], False, False),  # the search goes before it
        ([("search", ALL), ("combination", BEST)], False, True),
        ([("search", BEST), ("combination", ALL)], True, True),
    ],
)
def test_which_records_are_those_of_an_answer(world, kept, whole, partial):
    for arm, optimizations in kept:
        world.keep(arm, "combination", perf=perf(1.4), optimizations=optimizations)
    bench = default(FLAGS).bench
    found = [proving.recorded(proving.plan_of(BEST, of, bench), records.read(world.file)) for of in (True, False)]
    assert found == [whole, partial]


def test_a_set_of_which_nothing_is_missed_leaves_nothing_to_gate(world, capsys):
    world.keep_run(arms=("packed_attention",))
    world("--begin", "packed_attention")
    assert "no member is missed: there is nothing to gate" in capsys.readouterr().err and world.gated == []


def test_a_search_from_a_set_goes_on_after_its_time(world, capsys):
    world.keep_run()
    flags = ("--begin", "packed_attention", "--minutes", "0.000001", "--search.width", "1")
    world(*flags)
    assert "best so far is packed_attention + static_lora; the same command" in capsys.readouterr().err
    for _ in range(20):
        world(*flags)
        if world.gated:
            break
    assert world.gated == [BEST]
    timed = [(trial.stage, trial.against, trial.optimizations) for trial in world.trials]
    assert len(timed) == len(set(timed))


# Going on


def test_the_same_command_measures_nothing_twice(world, capsys):
    world.keep_run()
    world()
    before = world.file.read_bytes()
    world()
    assert world.started == [] and world.gated == [] and world.file.read_bytes() == before
    assert "static_lora + supervised_logits is the answer; run r has its record" in capsys.readouterr().err


def test_a_search_out_of_time_says_what_is_best_and_goes_on(world, capsys):
    world.keep_run()
    flags = ("--minutes", "0.000001", "--search.width", "1")
    world(*flags)
    captured = capsys.readouterr()
    assert "best so far is static_lora; the same command with --run r goes on" in captured.err
    assert json.loads(captured.out)["search"] == {"optimizations": ["static_lora"], "finished": False, "left_out": {}}
    assert world.gated == [] and len(world.trials) == 1
    for _ in range(20):
        world(*flags)
        if world.gated:
            break
    assert world.gated == [BEST] and records.read(world.file)[-1].arm == "search"


def test_out_of_time_the_best_so_far_may_be_gated_as_it_is(world, capsys):
    world.keep_run()
    world("--minutes", "0.000001", "--search.width", "1", "--accept")
    assert world.gated == [("static_lora",)] and records.read(world.file)[-1].arm == "partial_search"
    assert "best so far is static_lora; gated as it is" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_timed_and_says_how_to_go_on(world, capsys):
    def interrupt(on) -> None:
        if on == BEST:
            raise KeyboardInterrupt

    world.keep_run()
    world.fail = interrupt
    with pytest.raises(SystemExit) as stopped:
        guarded(world)
    *_, hint, said = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 130 and said == "interrupted"
    assert hint == "what was timed is kept; the same command with --run r goes on"
    assert [trial.round for trial in world.trials] == [1, 1, 1]
    world.fail = lambda on: None
    world()
    assert () in world.started or world.started[0] == ("static_lora",)
    assert world.gated == [BEST] and not list(world.file.parent.glob(".*"))


def test_another_commit_gets_a_run_of_its_own_unless_the_run_is_named(world, capsys):
    world.keep_run()
    world.sha = "def5678"
    with pytest.raises(UserError, match=r"^--run r: measured with commit abc1234, but now def5678; take another --run$"):
        world("--run", "r")
    world()
    captured = capsys.readouterr()
    assert "a run of its own, since the newest one is of something else" in captured.err
    assert json.loads(captured.out)["run_id"].endswith("-def5678")


def test_a_search_that_another_command_is_at_is_left_to_it(world):
    world.keep_run()
    with Claims(world.file.parent, "r") as others:
        assert others.take("search")
        with pytest.raises(UserError, match=r"^--run r: another command is at this search"):
            world()


# Candidates


def test_only_what_passed_in_this_setting_is_searched_and_the_rest_is_named(world, capsys):
    world.keep_run(arms=("static_lora",))
    world.keep("supervised_logits", verdict=FAILED)
    world.keep("packed_attention", recipe=world.recipe("--method", "full"))
    world.keep("merged_lora", "negative")
    world()
    said = capsys.readouterr().err.splitlines()
    assert "run r: searching among static_lora" in said
    (line,) = [line for line in said if line.startswith("not searched: ")]
    groups = dict(group.split(": ") for group in line.removeprefix("not searched: ").split("; "))
    assert groups["FAILED"] == "supervised_logits" and "packed_attention" in groups["no record in this setting"].split(", ")
    assert groups["compared with stock of a recipe of its own"] == "packing" and "merged_lora" not in line
    assert "silu_mul" in groups["not timed on this machine"] and "cuda_graphs" in groups["can't run on this machine"]


@pytest.mark.parametrize(("verdict", "alone", "searched"), [
    ({}, {}, {"static_lora", "packed_attention"}),
    ({"verdict": FAILED}, {}, {"static_lora"}),
    ({}, {"verdict": FAILED}, {"static_lora"}),
])  # fmt: skip
def test_what_passed_with_others_and_has_no_record_alone_is_searched(world, verdict, alone, searched):
    """Unless that combination failed, or it did alone."""
    world.keep_run(arms=("static_lora",))
    world.keep("combination", "combination", optimizations=("packed_attention", "static_lora"), **verdict)
    if alone:
        world.keep("packed_attention", **alone)
    world()
    assert {trial.candidates for trial in world.trials} == {tuple(sorted(searched))}


def test_what_works_in_the_update_alone_is_not_timed(world, monkeypatch):
    monkeypatch.setattr(registry, "unmet", lambda needs, device: None)
    assert registry.in_update("fused_adamw") and not registry.in_update("silu_mul") and not registry.in_update("nobody")
    for name in ("static_lora", "fused_adamw"):
        world.keep(name)
    asked = parse(default(list(FLAGS)), "", "", list(FLAGS))
    config, gpu = gate_config(asked, asked.gate), torch.device("cuda")
    chosen, _ = candidates(records.read(world.file), world.recipe(), config, gpu)
    assert {one.name: one.timed for one in chosen} == {"static_lora": True, "fused_adamw": False}


def test_the_newest_record_of_an_optimization_counts(world):
    world.keep_run(arms=("static_lora", "supervised_logits"))
    world.keep("supervised_logits", verdict=FAILED)
    world()
    assert {trial.candidates for trial in world.trials} == {("static_lora",)}


def test_more_evidence_is_the_same_setting(world):
    world.keep_run(recipe=world.recipe("--timing.blocks", "7", "--gate.steps", "9"))
    world()
    assert world.gated == [BEST] and records.read(world.file)[-1].run_id != "r"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--arms", "no_such"), "--arms no_such: no such optimization; there are "),
        (("--arms", "merged_lora"), "--arms merged_lora: a negative result, which never ships"),
        (("--arms", "keep_activations"), "--arms keep_activations: no record in this setting; only what has passed"),
        (("--arms", "silu_mul"), "--arms silu_mul: not timed on this machine; only what has passed"),
        (("--model", "qwen3.5-tiny"), "nothing to search: .*; `python -m bench.run` with the same recipe comes first"),
        (("--begin", "no_such"), "--begin no_such: no such optimization; searched are packed_attention, static_lora, super"),
        (("--begin", "merged_lora"), "--begin merged_lora: a negative result, which never ships; searched are "),
        (("--begin", "static_lora+silu_mul"), "--begin silu_mul: not timed on this machine; only what has passed its gate"),
        (("--begin", "keep_activations"), "--begin keep_activations: no record in this setting; only what has passed"),
        (("--arms", "static_lora", "--begin", "packed_attention"), "--begin packed_attention: not one of --arms; searched "),
        (("--begin", "static_lora", "static_lora"), "--begin static_lora: it is there twice"),
        (("--search.width", "0"), "search.width is 0; it must be at least 1"),
        (("--search.blocks", "1"), "search.blocks is 1; it must be at least 2"),
        (("--search.most-blocks", "1"), "search.most_blocks is 1; it must be at least 2"),
        (("--minutes", "0"), "--minutes is 0.0; it must be above 0"),
        (("--run", "a/b"), "--run a/b: letters, digits"),
        (("--gate.steps", "1"), "gate.steps is 1; it must be at least 3"),
    ],
)
def test_mistakes_are_one_line(world, arguments, words):
    world.keep_run()
    with pytest.raises(UserError, match=f"^{words}"):
        world(*arguments)
    assert world.started == [] and "\n" not in words


def test_what_has_failed_is_no_beginning(world):
    world.keep_run()
    world.keep("static_lora", verdict=FAILED)
    with pytest.raises(UserError, match=r"^--begin static_lora: FAILED; only what has passed its gate here, alone"):
        world("--begin", "static_lora")


def test_two_that_conflict_are_no_beginning(world, monkeypatch):
    known = registry.discover()
    one = dataclasses.replace(known["static_lora"], conflicts=("packed_attention",))
    monkeypatch.setattr(registry, "discover", lambda: known | {"static_lora": one})
    world.keep_run()
    with pytest.raises(UserError, match=r"^--begin static_lora: static_lora and packed_attention exclude one another$"):
        world("--begin", "packed_attention", "static_lora")
    assert world.started == []


def test_a_damaged_trial_is_named_before_anything_is_timed(world):
    world.keep_run()
    path = trials.path_of(world.reports, "box")
    path.parent.mkdir(parents=True)
    path.write_text('{"run_id": "r"}\n')
    with pytest.raises(UserError, match=r"box\.jsonl:1: not a valid record: no key "):
        world()
    assert world.started == []


# Real processes

SMALL = [
    "--device", "cpu", "--model", "qwen3-shallow-tiny", "--gate.steps", "3", "--gate.replicas", "2", "--gate.probes", "3",
    "--gate.repeats", "2", "--timing.blocks", "2", "--timing.micro-batches", "1", "--data.pack-length", "64",
    "--no-gradient-checkpointing", "--lora.rank", "4",
]  # fmt: skip
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_sets_are_timed_in_real_processes(tmp_path):
    from abtest.environment import describe

    reports = tmp_path / "reports"
    found = describe(torch.device("cpu"))
    flags = [*SMALL, "--reports", str(reports)]
    recipe = recipe_of(parse(default(list(flags)), "", "", list(flags)).bench, "float32")
    path = reports / "data" / found["device_slug"] / "records.jsonl"
    for arm, role in (("stock", "reference"), ("static_lora", "optimization")):
        record = Record(
            run_id="r", arm=arm, role=role, optimizations=(), verdict=Verdict(Level.BITWISE, ""), summary="",
            exactness="bitwise", why_exact="", environment=found, recipe=recipe, data={}, command="python -m bench.run",
            finished_at="2026-01-02T03:04:05Z", perf=perf(1.0),
        )  # fmt: skip
        records.append(path, record)
    words = [sys.executable, "-m", "bench.search", *flags, "--minutes", "0.001", "--search.blocks", "2"]
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    said = json.loads(line)
    faster = said["search"]["optimizations"] == ["static_lora"]  # the clock says; then leaving it out has no time any more
    assert said["run_id"] == "r" and said["search"]["finished"] is not faster
    (trial,) = trials.read(trials.path_of(reports, found["device_slug"]))
    assert trial.faster is faster
    assert (trial.stage, trial.against, trial.optimizations) == (
        "forward",
        (),
        ("static_lora",),
    ) and trial.timing.why is None
    assert trial.timing.blocks in range(2, 25) and trial.timing.real_tokens_per_s > 0
    assert trial.recipe == recipe and trial.environment == found
    assert (reports / "search" / "README.md").exists() and differences(reports / "data", reports) == []
    assert [arm["arm"] for arm in said["arms"]] == ["stock", "static_lora"], "nothing was gated"
