"""A run of several commands: what is recorded is not measured again, what there is no time for is left, and what another
command is at is its own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from abtest.arm import ArmFailed
from abtest.evidence import Evidence
from abtest.experiment import Candidate
from abtest.settings import GateConfig
from abtest.verdict import Check, Level, Verdict
from bench import budget, measure, records, run
from bench.ceilings import Ceilings
from bench.claims import Claims
from bench.command import Command
from bench.plan import combination, plan_arms
from loop.cli import guarded
from loop.config import Config
from loop.errors import UserError

TIMED = ["static_lora", "supervised_logits", "packed_attention"]  # plain PyTorch: a CPU times them, too
PASSED = Verdict(Level.ROUNDING, "close", (Check("scale error", 0.001, 0.003, True, "q", 2, "step 0"),))
PERF = records.Perf(9.0, 8.0, 4.0, 1.0, 2.0, 1.9, 2.1, 2, 2**30)
EVIDENCE = Evidence({"data": {}, "paths": {}}, {"loss": [2.0, 1.0]})


class World:
    """Stands in for processes, clock and git: every arm passes, unless `gate` says otherwise."""

    def __init__(self, reports: Path) -> None:
        self.reports, self.now, self.sha, self.dirty = reports, 0.0, "abc1234", False
        self.gated: list[str] = []  # by the last command
        self.order: list[str] = []  # what was begun and timed, over all commands
        self.first = None  # what its reference was prepared beside
        self.prepared = 0
        self.together: list[list[str]] = []  # what was gated side by side
        self.environment: dict[str, str] = {}  # of the last command's arms
        self.stock_seconds = self.arm_seconds = 0.0
        self.gate: Callable[[str], None] = lambda name: None

    def __call__(self, *arguments: str) -> list[str]:
        """One command; returns what it gated."""
        self.gated = []
        run.main(
            ["--device", "cpu", "--model", "qwen3-shallow-tiny", "--no-micro", *arguments, "--reports", str(self.reports)]
        )
        return self.gated

    def records(self, run_id: str) -> list[records.Record]:
        return [record for record in records.read(self.folder / "records.jsonl") if record.run_id == run_id]

    @property
    def folder(self) -> Path:
        return self.reports / "data" / "box"


class Stage:
    """An experiment without processes, in a world."""

    def __init__(self, world: World, environment: dict[str, str]) -> None:
        self.world, self.reference, self.repeat, self.sigma = world, EVIDENCE, EVIDENCE, (0.1, 0.1)
        self.reference_arm = self.repeat_arm = None
        self.early: dict = {}
        self.waiting = SimpleNamespace(quiet=lambda: world.order.append("quiet"))
        world.environment = environment

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *error: object) -> None:
        self.ended = True

    def begin_ahead(self, spec) -> None:
        self.world.order.append(f"{spec.name} begins")

    def prepare(self, first=None, timed: bool = True) -> None:
        self.world.order.append("stock is prepared")
        self.world.first = first and first.name
        self.world.prepared += 1
        self.world.now += self.world.stock_seconds

    def collect(self, specs) -> None:
        self.world.together.append([spec.name for spec in specs])
        self.world.now += self.world.arm_seconds
        for spec in specs:
            self.early[spec] = SimpleNamespace(error=None, evidence=EVIDENCE, seconds=self.world.arm_seconds)

    def repeat_verdict(self) -> Verdict:
        return Verdict(Level.BITWISE, "the same bits")

    def without_reference(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def end_repeat(self) -> None:
        self.repeat_arm = None

    def gate_arm(self, spec, claim) -> Candidate:
        self.world.gated.append(spec.name)
        self.world.now += self.world.arm_seconds
        self.world.gate(spec.name)
        return Candidate(contextlib.nullcontext(), PASSED, EVIDENCE)


@pytest.fixture
def world(tmp_path, monkeypatch) -> World:
    made = World(tmp_path)
    clock = SimpleNamespace(monotonic=lambda: made.now)
    monkeypatch.setattr(run, "time", clock)
    monkeypatch.setattr(budget, "time", clock)
    monkeypatch.setattr(run, "Experiment", lambda config, gate, folder, environment, progress: Stage(made, environment))
    monkeypatch.setattr(run, "measure_ceilings", lambda device: Ceilings(1.0, 1.0, 1, 1, "float32"))
    monkeypatch.setattr(run, "describe", lambda device: {"device_slug": "box", "git_sha": made.sha, "git_dirty": made.dirty})
    monkeypatch.setattr(run, "render", lambda data, reports: [])
    monkeypatch.setattr(measure, "time_arms", lambda *given: made.order.append("an arm is timed") or PERF)
    monkeypatch.setattr(measure, "time_equals", lambda *given: made.order.append("stock is timed") or (PERF, PERF))
    return made


def summary(capsys) -> dict:
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


# Going on


def test_what_is_recorded_is_not_measured_again(world, capsys):
    assert world("--run", "r", "--arms", "static_lora") == ["static_lora"]
    assert world("--run", "r", "--arms", "static_lora", "silu_mul") == ["silu_mul"]
    stock = ["stock", "stock_again"]
    assert [record.arm for record in world.records("r")] == [*stock, "static_lora", *stock, "silu_mul"]
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["run_id"] == "r" and last["left"] == []
    assert [arm["arm"] for arm in last["arms"]] == [*stock, "static_lora", "silu_mul"]


def test_a_run_without_a_name_is_a_new_one(world, capsys):
    assert world("--arms", "static_lora") == ["static_lora"]
    made = summary(capsys)["run_id"]
    assert made.endswith("-abc1234") and len(world.records(made)) == 3
    assert world("--run", "r", "--arms", "static_lora") == ["static_lora"]
    assert world("--run", made, "--arms", "static_lora") == []


def test_with_nothing_to_measure_not_even_stock_is(world, capsys):
    world("--run", "r", "--arms", "static_lora")
    before, prepared = (world.folder / "records.jsonl").read_bytes(), world.prepared
    assert world("--run", "r", "--arms", "static_lora") == [] and world.prepared == prepared
    assert (world.folder / "records.jsonl").read_bytes() == before
    assert "run r: nothing to measure here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--method", "full"), "measured with method = lora, but now full"),
        (("--data.pack-length", "256"), r"measured with data.pack_length = \d+, but now 256"),
        (("--gate.steps", "7"), r"measured with gate.steps = \d+, but now 7"),
        (("--timing.blocks", "3"), r"measured with timing.blocks = \d+, but now 3"),
        (("--dtype", "bfloat16"), "measured with dtype = float32, but now bfloat16"),
    ],
)
def test_one_run_has_one_recipe(flags, words, world):
    world("--run", "r", "--arms", "static_lora")
    with pytest.raises(UserError, match=f"^--run r: {words}; take another --run$"):
        world("--run", "r", "--arms", "silu_mul", *flags)
    assert world.gated == [] and world("--run", "other", "--arms", "silu_mul", *flags) == ["silu_mul"]


def test_an_arm_with_a_recipe_of_its_own_does_not_make_it_another_run(world):
    world("--run", "r", "--arms", "packing")
    assert "rows" in world.records("r")[-1].recipe["data"] and world.records("r")[-1].recipe != world.records("r")[0].recipe
    assert world("--run", "r", "--arms", "packing", "static_lora", "--micro", "--minutes", "9") == ["static_lora"]


@pytest.mark.parametrize(
    ("change", "words"),
    [({"sha": "def5678"}, "commit abc1234, but now def5678"), ({"dirty": True}, "uncommitted changes False, but now True")],
)
def test_one_run_is_one_state_of_the_code(change, words, world):
    world("--run", "r", "--arms", "static_lora")
    vars(world).update(change)
    with pytest.raises(UserError, match=f"^--run r: measured with {words}; take another --run$"):
        world("--run", "r", "--arms", "silu_mul")
    assert world.gated == [] and world("--arms", "silu_mul") == ["silu_mul"]


def test_ctrl_c_keeps_what_was_recorded_and_says_how_to_go_on(world, capsys):
    def interrupt(name: str) -> None:
        if name == "supervised_logits":
            raise KeyboardInterrupt

    world.gate = interrupt
    with pytest.raises(SystemExit) as stopped:
        guarded(lambda: world("--run", "r", "--arms", *TIMED))
    assert stopped.value.code == 130 and world.gated == TIMED[:2]
    *_, hint, last = capsys.readouterr().err.splitlines()
    assert hint == "what was measured is kept; the same command with --run r goes on" and last == "interrupted"
    world.gate = lambda name: None
    assert world("--run", "r", "--arms", *TIMED) == [*TIMED[1:], "combination"]
    assert not list(world.folder.glob(".*"))


def test_ctrl_c_before_anything_was_recorded_has_nothing_to_go_on_with(world, monkeypatch, capsys):
    def interrupt(self, first=None, timed=True) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Stage, "prepare", interrupt)
    with pytest.raises(KeyboardInterrupt):
        world("--run", "r", "--arms", "static_lora")
    assert "--run" not in capsys.readouterr().err


# Side by side


def test_arms_are_gated_two_at_a_time_behind_the_first(world):
    arms = ["static_lora", "supervised_logits", "packed_attention", "keep_activations", "merged_lora"]
    assert world("--run", "r", "--arms", *arms, "--gate.parallel", "4", "--no-combine") == [
        "static_lora", "supervised_logits", "packed_attention", "merged_lora", "keep_activations",
    ]  # fmt: skip
    assert world.first == "static_lora"
    assert world.together == [
        ["supervised_logits", "packed_attention"]
    ]  # the fourth has no partner left, the last none ever
    assert {record.arm for record in world.records("r")} == {"stock", "stock_again", *arms}


def test_in_full_fine_tuning_no_more_than_two_are_gated_together(world):
    arms = ["rms_norm", "silu_mul", "packed_attention", "supervised_logits", "rope_qk_norm"]
    world("--run", "r", "--arms", *arms, "--gate.parallel", "8", "--no-combine", "--method", "full")
    assert world.together == [arms[1:3], arms[3:]]
    world.together.clear()
    world("--run", "s", "--arms", *arms, "--gate.parallel", "8", "--no-combine")
    assert world.together == [arms[1:]]


def test_an_arm_that_ends_beside_another_is_tried_again_alone(world, monkeypatch):
    ended = []

    def collect(self, specs) -> None:
        for spec in specs:
            arm = SimpleNamespace(__exit__=lambda *error: ended.append("ended"))
            self.early[spec] = SimpleNamespace(error=ArmFailed("out of memory"), evidence=None, seconds=1.0, arm=arm)

    monkeypatch.setattr(Stage, "collect", collect)
    assert world("--run", "r", "--arms", *TIMED, "--gate.parallel", "4", "--no-combine") == TIMED
    assert ended == ["ended", "ended"]


def test_with_few_processes_arms_take_turns(world):
    world("--run", "r", "--arms", *TIMED, "--gate.parallel", "2")
    assert world.together == []


# The budget


def test_an_arm_that_would_end_too_late_is_left_for_the_next_command(world, capsys):
    world.stock_seconds, world.arm_seconds = 240.0, 120.0
    assert world("--run", "r", "--arms", *TIMED, "--minutes", "9") == TIMED[:2]
    captured = capsys.readouterr()
    assert "left: packed_attention, combination; the same command with --run r goes on with them" in captured.err
    assert json.loads(captured.out)["left"] == ["packed_attention", "combination"]
    assert world("--run", "r", "--arms", *TIMED, "--minutes", "9") == [TIMED[2], "combination"]
    assert summary(capsys)["left"] == []


def test_the_first_arm_always_begins_so_that_every_command_gets_further(world, capsys):
    world.stock_seconds, world.arm_seconds = 240.0, 120.0
    for name in (*TIMED, "combination"):
        assert world("--run", "r", "--arms", *TIMED, "--minutes", "0.5") == [name]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["left"] == []


def test_an_arm_that_cannot_run_here_needs_no_time(world):
    world.stock_seconds = world.arm_seconds = 100.0
    world("--run", "r", "--arms", "static_lora", "silu_mul", "fp8_mma", "--minutes", "0.1")
    assert {record.arm: record.verdict.level for record in world.records("r")[2:]} == {
        "static_lora": Level.ROUNDING, "fp8_mma": Level.NOT_RUN,
    }  # fmt: skip


def test_an_arm_is_expected_to_take_as_long_as_the_longest_and_its_own_stock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=lambda: now[0]))
    plan = SimpleNamespace(missing=None, own_stock=False)
    own = SimpleNamespace(missing=None, own_stock=True)
    made = budget.Budget(10.0, 0.0)
    made.note_stock(200.0)
    assert made.begin(plan)
    made.note(plan, 50.0)
    made.note(plan, 30.0)
    assert made.estimate(plan) == 50.0 and made.estimate(own) == 250.0
    now[0] = 400.0
    assert made.begin(plan) and not made.begin(own)
    made.note(own, 300.0)
    assert made.estimate(plan) == 50.0 and made.estimate(own) == 300.0
    now[0] = 551.0
    assert not made.begin(plan) and budget.Budget(None, 0.0).begin(own)


# The combination


def test_the_combination_is_of_what_passed_in_the_whole_run(world):
    for name in TIMED:
        assert world("--run", "r", "--arms", name, "--no-combine") == [name]
    assert world("--run", "r", "--arms", *TIMED) == ["combination"]
    combined = world.records("r")[-1]
    assert combined.role == "combination" and sorted(combined.optimizations) == sorted(TIMED)
    assert world("--run", "r", "--arms", *TIMED) == []


@pytest.fixture
def with_peers(world, monkeypatch):
    """Peers pass, and are timed in turn with the best."""
    evidence = dataclasses.replace(EVIDENCE, build=EVIDENCE.build | {"peer": {}}, work={"kernels": {}})

    def gate_arm(self, spec, claim) -> Candidate:
        world.gated.append(spec.name)
        return Candidate(MagicMock(), PASSED, evidence)

    monkeypatch.setattr(Stage, "gate_arm", gate_arm)
    monkeypatch.setattr(Stage, "environment", {}, raising=False)
    monkeypatch.setattr(Stage, "folder", world.reports, raising=False)
    monkeypatch.setattr(measure, "Arm", MagicMock())
    monkeypatch.setattr(measure, "race", lambda peer, other, best, timing: records.Race(best.arm, (), 2, 1, 3, 4))
    return world


def test_peers_come_behind_the_combination(with_peers):
    """Each is timed in turn with the fastest that passed, and that should be what ships."""
    world = with_peers
    assert world("--run", "r", "--arms", "transformers_peft", *TIMED[1:]) == [*TIMED[1:], "combination", "transformers_peft"]
    assert world.records("r")[-1].race == records.Race("supervised_logits", (), 2, 1, 3, 4)  # of equally fast ones the first


@pytest.mark.parametrize("parallel", ["1", "4"])
def test_where_nothing_is_combined_peers_keep_their_places(parallel, with_peers):
    """A long command does what matters before the rest, and prepares stock once."""
    world, flags = with_peers, ("--no-combine", "--gate.parallel", parallel, "--arms")
    wanted = ["supervised_logits", "transformers_peft", "static_lora"]
    assert world("--run", "r", *flags, *wanted) == wanted
    assert [one.race.arm for one in world.records("r") if one.race] == ["supervised_logits"]
    # Who may go beside the reference comes first still, among those that no peer parts.
    arms = ("keep_activations", "static_lora", "transformers_peft", "supervised_logits")
    first = arms if parallel == "1" else ("static_lora", "keep_activations", *arms[2:])
    assert world("--run", "s", *flags, *arms) == list(first)


def test_peers_get_ready_while_others_are_gated_and_nothing_is_timed_meanwhile(world, monkeypatch):
    refused = Candidate(contextlib.nullcontext(), Verdict(Level.NOT_RUN, "no"), None)
    monkeypatch.setattr(Stage, "gate_arm", lambda self, spec, claim: refused)
    peers = ["transformers_peft", "transformers_peft_fla", "transformers_peft_compile"]
    world("--run", "alone", "--arms", "static_lora", *peers)
    assert world.order[0] == "stock is prepared"
    world("--run", "r", "--gate.parallel", "4", "--arms", "static_lora", peers[2])
    world.order.clear()
    world("--run", "r", "--gate.parallel", "4", "--arms", "static_lora", *peers)
    # FLA's needs a GPU, and the third has its record.
    assert world.order == [f"{peers[0]} begins", "stock is prepared", "quiet", "stock is timed"]


def test_an_arm_is_timed_when_it_is_quiet(world):
    world("--run", "r", "--arms", "static_lora", "supervised_logits")
    timed = [index for index, what in enumerate(world.order) if what.endswith("timed")]
    assert len(timed) == 4 and all(world.order[index - 1] == "quiet" for index in timed)


@pytest.mark.parametrize(("faster", "slower"), [("static_lora", "lora_matmul"), ("lora_matmul", "static_lora")])
def test_of_two_that_conflict_the_one_that_was_faster_in_this_run_is_combined(world, faster, slower, monkeypatch):
    ratios = {faster: 1.5, slower: 1.2}
    monkeypatch.setattr(
        measure, "time_arms", lambda *given: dataclasses.replace(PERF, ratio=ratios.get(world.gated[-1], PERF.ratio))
    )
    assert world("--run", "r", "--arms", "lora_matmul", "static_lora", "packed_attention")[-1] == "combination"
    assert world.records("r")[-1].optimizations == tuple(sorted([faster, "packed_attention"]))
    assert world("--run", "r", "--arms", "lora_matmul", "static_lora", "packed_attention") == []


@pytest.mark.parametrize(
    ("ratios", "kept"),
    [
        ({"lora_matmul": 1.0, "silu_mul": 1.0, "static_lora": 1.0}, ("lora_matmul", "silu_mul")),
        ({"lora_matmul": 0.9, "silu_mul": 1.3, "static_lora": 0.95}, ("silu_mul", "static_lora")),
        ({"lora_matmul": 1.3, "sm121a_matmul": 1.2, "static_lora": 1.1, "silu_mul": 1.0}, ("lora_matmul", "silu_mul")),
        # One that has to go for a third is in nobody's way any more.
        ({"full_ft_linear": 1.1, "lora_matmul": 1.3, "sm121a_matmul": 1.2}, ("full_ft_linear", "lora_matmul")),
        ({"lora_matmul": 1.3, "static_lora": 1.2}, None),
        ({}, None),
    ],
)
def test_a_combination_keeps_the_faster_of_two_and_the_order(ratios, kept):
    found = combination(ratios, Config())
    assert kept is None if found is None else found.optimizations == kept


def test_a_combination_that_is_asked_for_is_one_arm(world, capsys):
    """In the registry's order whatever is typed, once, and without any of its parts."""
    assert world("--run", "r", "--arms", "supervised_logits+static_lora") == ["combination"]
    (found,) = [record for record in world.records("r") if record.role == "combination"]
    assert found.optimizations == ("static_lora", "supervised_logits") and found.perf is not None
    assert summary(capsys)["left"] == []
    assert world("--run", "r", "--arms", "static_lora+supervised_logits") == []
    assert world("--run", "r", "--arms", "static_lora", "static_lora+supervised_logits") == ["static_lora"]
    assert {record.arm for record in world.records("r")} == {"stock", "stock_again", "combination", "static_lora"}


def test_what_a_combination_lacks_is_said_and_what_is_interpreted_is_not_timed():
    (plan,) = plan_arms(["ssm_fast_path+static_lora"], Config(), torch.device("cpu"))
    assert plan.missing.startswith("ssm_fast_path: needs a CUDA device")
    (plan,) = plan_arms(["silu_mul+static_lora"], Config(), torch.device("cpu"))
    assert plan.missing is None and "interpreter" in plan.untimed and plan.optimizations == ("silu_mul", "static_lora")


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        (["static_lora+nobody"], "--arms nobody: no such arm"),
        (["static_lora+"], "--arms : no such arm"),
        (["static_lora+static_lora"], "static_lora is there twice"),
        (["static_lora+silu_mul+lora_matmul"], "lora_matmul and static_lora exclude one another"),
        (["static_lora+unsloth"], "unsloth can be part of no combination"),
        (["static_lora+merged_lora"], "merged_lora can be part of no combination"),
        (["static_lora+packing"], "packing can be part of no combination"),
        (["static_lora+silu_mul", "silu_mul+rms_norm"], "--arms silu_mul+rms_norm: a second combination"),
    ],
)
def test_what_can_t_be_combined_is_said(arms, words):
    with pytest.raises(UserError) as raised:
        plan_arms(arms, Config(), torch.device("cpu"))
    assert words in str(raised.value)


def test_a_later_arm_makes_another_combination(world):
    assert world("--run", "r", "--arms", *TIMED[:2]) == [*TIMED[:2], "combination"]
    assert world("--run", "r", "--arms", TIMED[2]) == [TIMED[2], "combination"]
    combined = [record.optimizations for record in world.records("r") if record.role == "combination"]
    assert sorted(combined[0]) == sorted(TIMED[:2]) and sorted(combined[1]) == sorted(TIMED)


def test_one_optimization_is_no_combination(world, capsys):
    assert world("--run", "r", "--arms", "static_lora") == ["static_lora"]
    assert summary(capsys)["left"] == []


# Several commands at a time


def test_what_another_command_is_at_is_left_to_it(world, capsys):
    with Claims(world.folder, "r") as others:
        world.folder.mkdir(parents=True)
        assert others.take("static_lora")
        assert world("--run", "r", "--arms", *TIMED) == TIMED[1:]
        assert summary(capsys)["left"] == ["static_lora", "combination"]
        assert world("--run", "s", "--arms", "static_lora") == ["static_lora"]
    assert world("--run", "r", "--arms", *TIMED) == ["static_lora", "combination"]


def test_where_others_are_at_everything_stock_is_not_measured(world, capsys):
    with Claims(world.folder, "r") as others:
        world.folder.mkdir(parents=True)
        assert all(others.take(name) for name in TIMED)
        assert world("--run", "r", "--arms", *TIMED) == [] and world.prepared == 0
    assert summary(capsys) == {"run_id": "r", "arms": [], "left": [*TIMED, "combination"]}


def test_what_another_command_records_in_the_meantime_is_not_measured_again(world):
    def another(name: str) -> None:
        if name == "static_lora":
            world.gate = lambda name: None
            gated = world.gated
            assert world("--run", "r", "--arms", *TIMED) == TIMED[1:]  # all but what this one is at, and no combination
            world.gated = gated

    world.gate = another
    assert world("--run", "r", "--arms", *TIMED) == ["static_lora", "combination"]
    names = [record.arm for record in world.records("r") if record.role not in ("reference", "repeat")]
    assert sorted(names) == sorted([*TIMED, "combination"])


def test_two_commands_that_end_together_measure_one_combination(world):
    world("--run", "r", "--arms", *TIMED, "--no-combine")

    def another(name: str) -> None:
        assert name == "combination"
        world.gate = lambda name: None
        gated = world.gated
        assert world("--run", "r", "--arms", *TIMED) == []
        world.gated = gated

    world.gate = another
    assert world("--run", "r", "--arms", *TIMED) == ["combination"]


# Beside the reference


def test_the_first_arm_that_may_goes_beside_the_reference(world):
    # keep_activations keeps most memory of all, and packing has a stock of its own: they come later.
    arms = ("keep_activations", "packing", "static_lora")
    assert world("--arms", *arms, "--gate.parallel", "4") == ["static_lora", "keep_activations", "packing", "combination"]
    world("--arms", "static_lora", "--gate.parallel", "4")
    assert world.first == "static_lora"
    world("--arms", "static_lora", "--gate.parallel", "1")
    assert world.first is None


@pytest.mark.parametrize("checkpointing", [True, False])
def test_an_arm_that_recomputes_less_than_stock_takes_no_company(checkpointing):
    command = Command(gate=GateConfig(parallel=4), gradient_checkpointing=checkpointing)
    (plan,) = plan_arms(["static_lora"], command, torch.device("cuda"))
    alone = dataclasses.replace(plan, missing=None, config=dataclasses.replace(plan.config, gradient_checkpointing=False))
    assert measure.goes_beside(alone, command) is not checkpointing
    assert not measure.goes_beside(dataclasses.replace(alone, role="peer"), command)


def early(world, monkeypatch, collected) -> None:
    """What the first arm comes to beside the reference."""
    prepare = Stage.prepare

    def beside(self, first=None, timed=True) -> None:
        prepare(self, first, timed)
        self.early[first] = collected

    monkeypatch.setattr(Stage, "prepare", beside)


def test_an_arm_that_ended_beside_the_reference_is_tried_again_alone(world, monkeypatch, capsys):
    ended = []
    arm = SimpleNamespace(__exit__=lambda *error: ended.append(error))
    early(world, monkeypatch, SimpleNamespace(arm=arm, error=ArmFailed("out of memory: 3 GiB"), evidence=None, seconds=9.0))
    assert world("--run", "r", "--arms", "static_lora", "--gate.parallel", "4") == ["static_lora"]
    assert ended == [(None, None, None)] and world.records("r")[-1].verdict == PASSED
    assert "static_lora: out of memory: 3 GiB; once more, alone" in capsys.readouterr().err


def test_the_time_beside_the_reference_is_the_arms_too(world, monkeypatch):
    early(world, monkeypatch, SimpleNamespace(error=None, evidence=EVIDENCE, seconds=300.0))
    world.stock_seconds, world.arm_seconds = 240.0, 10.0
    assert world("--arms", *TIMED, "--gate.parallel", "4", "--minutes", "9") == TIMED[:1]


# Sharing the GPU


def test_arms_join_the_service_where_there_is_one_and_records_say_so(world, monkeypatch):
    asked = []

    @contextlib.contextmanager
    def service(wanted: bool):
        asked.append(wanted)
        yield {"CUDA_MPS_PIPE_DIRECTORY": "/pipe"}

    monkeypatch.setattr(run, "shared_gpu", service)
    world("--run", "r", "--arms", "static_lora", "--gate.parallel", "4")
    assert asked == [False]  # no GPU here
    assert world.environment["CUDA_MPS_PIPE_DIRECTORY"] == "/pipe" and "PYTORCH_ALLOC_CONF" in world.environment
    assert world.environment["TEARDOWN_CUPTI"] == "1", "a profiler that stays slows down whoever was looked at"
    assert all(record.environment["shared_by_mps"] is True for record in world.records("r"))
