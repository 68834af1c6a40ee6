"""`python -m bench.run` as a user runs it: the files it leaves, the mistakes it names, and Ctrl-C."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from abtest import template
from abtest.arm import ArmFailed
from abtest.evidence import Evidence
from abtest.experiment import Candidate
from abtest.in_process import InProcessExperiment
from abtest.progress import GateProgress
from abtest.verdict import PARTS, Check, Level, Verdict
from abtest.waiting import Waiting
from bench import measure, records, report, run
from bench.ceilings import Ceilings
from bench.ledger import Ledger
from bench.plan import ArmPlan, plan_arms
from bench.report.shipping import decide
from kernels.contract import Exactness
from loop.cli import guarded
from loop.errors import UserError
from loop.recipe import to_plain

ROOT = Path(__file__).resolve().parents[2]
# Of a rank with which the overfit state is reached in half the steps that it takes with 4.
SMALL = [
    "--device", "cpu", "--model", "qwen3.5-shallow-tiny", "--gate.steps", "3", "--gate.replicas", "2", "--gate.probes", "3",
    "--gate.repeats", "2", "--timing.blocks", "2", "--timing.micro-batches", "1", "--data.pack-length", "64", "--no-micro",
    "--no-gradient-checkpointing", "--lora.rank", "16",
]  # fmt: skip
# One thread: on a box shared with other work, two threads that wait for each other are many times slower.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
ASKED = ["static_lora", "silu_mul", "transformers_peft", "transformers_peft_fla"]
ARMS = ["stock", "stock_again", *ASKED]


def words(*arguments: str, reports: Path) -> list[str]:
    """The command; runs into one folder share what the oracle computed."""
    kept = ("--reports", str(reports), "--gate.oracle-cache", str(reports.parent / "oracle"))
    return [sys.executable, "-m", "bench.run", *arguments, *SMALL, *kept]


def command(*arguments: str, reports: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        words(*arguments, reports=reports), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """One run with two optimizations, the one that is timed on a CPU and one that is not, and two peers, the one that runs
    and leaks and one that can't be here."""
    reports = tmp_path_factory.mktemp("bench") / "reports"
    return reports, command("--arms", *ASKED, reports=reports)


def differing(reports: Path) -> list[str]:
    """Rendered files that the records don't lead to."""
    return report.differences(reports / "data", reports)


def records_file(reports: Path) -> Path:
    (found,) = reports.glob("data/*/records.jsonl")
    return found


def test_it_ends_well_with_one_json_line_on_stdout(done):
    _, process = done
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    (line,) = process.stdout.splitlines()
    summary = json.loads(line)
    arms = {arm["arm"]: arm for arm in summary["arms"]}
    assert list(arms) == ARMS and summary["left"] == []
    assert [arm["level"] for arm in arms.values()] == [*["BITWISE"] * 3, "ROUNDING", "FAILED", "NOT_RUN"]
    assert all(arm["reason"] for arm in arms.values())


def test_what_passed_is_timed_and_what_the_interpreter_ran_is_not(done):
    arms = {arm["arm"]: arm for arm in json.loads(done[1].stdout)["arms"]}
    for name in ("stock", "stock_again", "static_lora"):
        arm = arms[name]
        assert arm["untimed"] is None and arm["ratio_low"] <= arm["ratio"] <= arm["ratio_high"]
        assert 0 < arm["supervised_tokens_per_s"] <= arm["real_tokens_per_s"] <= arm["positions_per_s"]
        assert arm["peak_memory_bytes"] > 1 << 27 and 0 < arm["mfu"] < 1
    assert arms["stock"]["ratio"] == 1.0
    assert arms["silu_mul"]["ratio"] is None and "interpreter" in arms["silu_mul"]["untimed"]


def test_records_hold_the_run(done):
    reports, process = done
    kept = records.read(records_file(reports))
    assert [record.arm for record in kept] == ARMS
    assert [record.role for record in kept] == ["reference", "repeat", *["optimization"] * 2, *["peer"] * 2]
    assert len({record.run_id for record in kept}) == 1
    for record in kept[:-1]:
        assert len(record.losses) == len(record.reference_losses) == len(record.noise_sigma) == 3
        assert record.recipe["gate"]["steps"] == 3 and record.recipe["dtype"] == "float32"
        assert not {"reports", "arms", "run", "minutes"} & set(record.recipe) and "oracle_cache" not in record.recipe["gate"]
        assert record.environment["shared_by_mps"] is False
        assert str(reports.parent) not in json.dumps([record.data, record.recipe])
        assert record.data["pack_length"] == 64 and record.environment["matmul_flops_per_s"] > 0
        assert record.environment["device_slug"] == records_file(reports).parent.name
        assert record.command.startswith(f"python -m bench.run --arms {' '.join(ASKED)}")
    assert [{check.part for check in record.verdict.checks} for record in kept[2:4]] == [set(PARTS), set(PARTS) - {0}]
    states = {check.state for check in kept[3].verdict.checks if check.part == 2}
    assert states == {"step 0", "step 1, slow decay", "step 2, uneven vectors", "overfit"}
    summary = {arm["arm"]: arm for arm in json.loads(process.stdout)["arms"]}
    assert kept[2].perf.ratio == summary["static_lora"]["ratio"] and kept[3].perf is None
    assert any("StaticLora" in path for path in kept[2].environment["paths"])
    assert not any("StaticLora" in path for path in kept[0].environment["paths"])


def test_a_peer_that_leaks_is_timed_and_one_that_cannot_be_here_is_not(done):
    reports, process = done
    arms = {arm["arm"]: arm for arm in json.loads(process.stdout)["arms"]}
    leaks, absent = arms["transformers_peft"], arms["transformers_peft_fla"]
    leak = "editing documents outside the loss leaves the micro-step unchanged"
    assert leaks["level"] == "FAILED" and leaks["real_tokens_per_s"] > 0 and leak in leaks["reason"]
    assert absent["level"] == "NOT_RUN" and absent["real_tokens_per_s"] is None
    (kept,) = (record for record in records.read(records_file(reports)) if record.arm == "transformers_peft")
    checks = {check.name: check for check in kept.verdict.checks}
    assert all(
        checks[f"same {what} in both arms"].passed for what in ("initial weights", "frozen weights", "trained tensors")
    )
    assert not checks["gradient error ratio, worst parameter"].passed


def test_reports_are_rendered_and_rendering_again_changes_nothing(done):
    reports, _ = done
    device = reports / records_file(reports).parent.name
    shipping = tomllib.loads((device / "shipping.toml").read_text())
    assert set(shipping["setting"][0]["enable"]) <= {"static_lora"}
    for name in ("README.md", "static_lora.md", "static_lora.png", "silu_mul.md", "overview.png"):
        assert (device / name).stat().st_size > 100
    assert differing(reports) == []
    before = {path: path.read_bytes() for path in reports.rglob("*") if path.is_file()}
    report.render(reports / "data", reports)
    assert {path: path.read_bytes() for path in reports.rglob("*") if path.is_file()} == before


def test_progress_names_arm_and_phase_on_stderr(done):
    lines = done[1].stderr.splitlines()
    assert any("static_lora: training (3 steps)" in line for line in lines)
    assert any(line.startswith("silu_mul: ROUNDING") for line in lines)
    percents = [int(line[1:4]) for line in lines if line.startswith("[")]
    assert percents == sorted(percents) and percents[-1] <= 100


def workers_of(group: int) -> list[int]:
    """Processes of a process group that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, process_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state != "Z":
                found.append(int(stat.parent.name))
    return found


@pytest.fixture
def running(done) -> Iterator[tuple[subprocess.Popen, Path]]:
    """A second run into the same folder, leader of its own process group, stopped once it gates static_lora."""
    reports, _ = done
    process = subprocess.Popen(
        words("--arms", "static_lora", reports=reports), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    yield process, reports
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_ctrl_c_ends_it_cleanly_and_a_second_run_appends(running):
    process, reports = running
    before = records_file(reports).read_bytes()
    for line in process.stderr:
        if "static_lora: gradients" in line:
            break
    # Itself, stock, static_lora, the spare for the arm after it, and what they are forked from.
    assert len(workers_of(process.pid)) == 4 + template.usable()
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    *_, newest = records.read(records_file(reports))
    hint = f"what was measured is kept; the same command with --run {newest.run_id} goes on"
    assert out == "" and [line for line in err.splitlines() if not line.startswith("[")] == [hint, "interrupted"]
    deadline = time.monotonic() + 10
    while workers_of(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not workers_of(process.pid)
    after = records_file(reports).read_bytes()
    assert after.startswith(before) and after.endswith(b"\n")
    kept = records.read(records_file(reports))
    assert [record.arm for record in kept] == [*ARMS, "stock", "stock_again"]
    assert len({record.run_id for record in kept}) == 2
    report.render(reports / "data", reports)
    assert differing(reports) == []


MISTAKES = {
    "unknown arm": (["--arms", "nope"], "--arms nope: no such arm"),
    "dropout": (["--lora.dropout", "0.1"], "lora.dropout must be 0"),
    "steps": (["--gate.steps", "2"], "gate.steps is 2; it must be at least 3"),
    "replicas": (["--gate.replicas", "1"], "gate.replicas is 1; it must be at least 2"),
    "repeats": (["--gate.repeats", "1"], "gate.repeats is 1; it must be at least 2"),
    "probes": (["--gate.probes", "2"], "gate.probes is 2; it must be at least 3"),
    "blocks": (["--timing.blocks", "1"], "timing.blocks is 1"),
    "a run that is no name": (["--run", "../x"], "--run ../x: letters, digits"),
    "no time": (["--minutes", "0"], "--minutes is 0.0; it must be above 0"),
    "an output folder": (["--output", "runs/x"], "--output and --resume are for python -m loop.train"),
    "unknown flag": (["--no-such-flag"], "no-such-flag"),
    "unknown recipe": (["--recipe", "absent.toml"], "absent.toml: no such file"),
    "data that is not there": (["--data", "absent.jsonl"], "absent.jsonl"),
    "model that is not there": (["--model", "./absent"], "./absent"),
    "pack too long for its data": (["--data.pack-length", "2"], "pack"),
}


@pytest.mark.parametrize(("arguments", "words"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_name_what_is_wrong(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "Experiment", InProcessExperiment)
    monkeypatch.setattr(sys, "argv", ["bench.run", "--arms", "static_lora", *SMALL, *arguments, "--reports", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        guarded(run.main)
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == ""
    errors = [line for line in printed.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and words in errors[0] and printed.err.splitlines()[-1] == errors[0]
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_damaged_record_is_named_before_anything_is_measured(done, tmp_path):
    kept = records_file(done[0])
    copied = tmp_path / "data" / kept.parent.name / "records.jsonl"
    copied.parent.mkdir(parents=True)
    copied.write_bytes(kept.read_bytes().splitlines(keepends=True)[0] + b'{"arm": "half a rec\n')
    before = copied.read_bytes()
    with pytest.raises(UserError, match=r"records\.jsonl:2: not a valid record"):
        run.main([*SMALL, "--reports", str(tmp_path)])
    assert copied.read_bytes() == before


def test_reports_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "reports").write_text("a file")
    with pytest.raises(UserError, match=r"--reports .*; a folder to write to is expected"):
        run.main([*SMALL, "--reports", str(tmp_path / "reports")])


def plan(name: str) -> ArmPlan:
    return ArmPlan(name, "optimization", (), run.Command(), Exactness.ROUNDING, "", "")


@pytest.fixture
def bench(tmp_path) -> measure.Bench:
    """A run whose experiment has a reference and no processes; its arms are candidates that passed."""
    evidence = Evidence({"data": {}, "paths": {}}, {"loss": [2.0, 1.0]})
    verdict = Verdict(Level.ROUNDING, "close", (Check("scale error", 0.001, 0.003, True, "q", 2, "step 0"),))
    arm = contextlib.nullcontext(SimpleNamespace(spec=SimpleNamespace(name="fast")))
    candidate = Candidate(arm, verdict, evidence)
    experiment = SimpleNamespace(
        reference=evidence, sigma=(0.1, 0.1), reference_arm=None, gate_arm=lambda spec, claim: candidate, waiting=Waiting()
    )
    facts = {"run_id": "r", "environment": {"device_slug": "box"}, "recipe": {}, "data": {}, "command": "c"}
    command = run.Command(reports=tmp_path, micro=False)
    return measure.Bench(command, GateProgress(10), experiment, Ceilings(1.0, 1.0, 1, 1, "float32"), facts)


def ends(*given, **named):
    raise ArmFailed("the process of arm fast ended with code 1: out of paper", "many\nlines")


def test_an_arm_whose_process_ends_is_a_failed_record_and_the_run_goes_on(bench):
    passing = bench.experiment.gate_arm
    bench.experiment.gate_arm = ends
    bench.arm(plan("fast"))
    bench.experiment.gate_arm = passing
    bench.arm(dataclasses.replace(plan("slow"), untimed="not here"))
    failed, passed = records.read(records_file(bench.command.reports))
    assert failed.verdict == Verdict(Level.FAILED, "the process of arm fast ended with code 1: out of paper")
    assert [(check.part, check.state) for check in passed.verdict.checks] == [(2, "step 0")]
    assert passed.verdict.level is Level.ROUNDING and passed.untimed == "not here" and passed.losses == (2.0, 1.0)


def test_an_arm_that_ends_while_it_is_timed_keeps_its_verdict(bench, monkeypatch):
    monkeypatch.setattr(measure, "time_arms", ends)
    bench.arm(plan("fast"))
    (record,) = records.read(records_file(bench.command.reports))
    assert record.verdict.level is Level.ROUNDING and record.perf is None
    assert record.untimed == "timing broke off: the process of arm fast ended with code 1: out of paper"


def test_a_reference_that_cannot_run_is_one_line(bench):
    bench.experiment.prepare = ends
    with pytest.raises(UserError, match=r"without its reference nothing can be compared: .* out of paper"):
        bench.reference()


def own_stock_of(bench, prepare) -> SimpleNamespace:
    """An experiment of an arm's own, with other losses than the run's."""
    stock = SimpleNamespace(**vars(bench.experiment), prepare=prepare)
    stock.reference, stock.sigma = Evidence({"data": {"packs": 7}, "paths": {}}, {"loss": [5.0, 4.0]}), (0.2, 0.2)
    return stock


def test_an_arm_with_a_recipe_is_compared_with_stock_of_it_and_does_not_ship(bench, monkeypatch):
    own = own_stock_of(bench, lambda timed: None)
    bench.own_experiment = lambda plan: contextlib.nullcontext(own)
    perf = records.Perf(9.0, 8.0, 4.0, 1.0, 1.0, 1.0, 1.0, 2, 2**30)
    timed = dataclasses.replace(perf, ratio=3.0, ratio_low=2.9, ratio_high=3.1)
    monkeypatch.setattr(measure, "time_equals", lambda stock, arm, *rest: (perf, timed))
    monkeypatch.setattr(
        measure, "time_arms", lambda *rest: dataclasses.replace(timed, ratio=2.0, ratio_low=1.9, ratio_high=2.1)
    )
    packing, silu = plan_arms(("packing", "silu_mul"), bench.config, torch.device("cpu"))
    silu = dataclasses.replace(silu, untimed=None)
    assert packing.own_stock and not silu.own_stock and silu.config == bench.config
    bench.facts["recipe"] = to_plain(bench.config)
    bench.keep(dataclasses.replace(plan("stock"), role="reference"), Verdict(Level.BITWISE, ""))
    bench.arm(packing)
    bench.arm(silu)
    stock, packed, plain = records.read(records_file(bench.command.reports))
    assert packed.reference_losses == (5.0, 4.0) and packed.data == {"packs": 7} and packed.perf.ratio == 3.0
    assert packed.recipe["data"] == stock.recipe["data"] | {"rows": "padded", "fill": "shuffled"}
    (note,) = packed.notes
    assert (
        "data.rows = padded, data.fill = shuffled. That stock: 8 real tokens/s, 9 positions/s, peak memory 1.00 GiB" in note
    )
    assert plain.recipe == stock.recipe and plain.reference_losses == (2.0, 1.0) and not plain.notes
    shipping = decide([stock, packed, plain])
    assert shipping.enable == ("silu_mul",) and "stock of another recipe" in shipping.not_enabled["packing"]
    assert Ledger(bench.path, "r", stock.recipe).passed() == {"silu_mul": 2.0}


def test_an_arm_whose_own_stock_cannot_run_is_invalid(bench):
    bench.own_experiment = lambda plan: contextlib.nullcontext(own_stock_of(bench, ends))
    bench.arm(*plan_arms(("packing",), bench.config, torch.device("cpu")))
    (record,) = records.read(records_file(bench.command.reports))
    assert record.verdict.level is Level.INVALID and "stock of its own recipe: " in record.verdict.reason
    assert record.reference_losses == () and record.recipe["data"]["rows"] == "padded"
