"""`python -m bench.micro`: what it refuses, what it prints, and the statistics behind a ratio."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from abtest.environment import describe
from bench import ceilings, micro, micro_records
from bench.ceilings import Ceilings
from bench.report import differences
from bench.timing import ratio_interval, time_pair
from kernels import registry
from kernels.contract import Exactness, Needs, Op, Optimization, Workload
from loop.device import device_slug
from loop.errors import UserError

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e10, 1e11, 1 << 20, 64, "float32")


def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


def optimization_with(candidate, **changes) -> Optimization:
    workload = Workload("tiny", {"N": 200}, small=True)
    op = Op(square, candidate, seeded, (workload,), lambda w: 4000, lambda w: 600)
    made = Optimization("squares", "", Exactness.ROUNDING, "", lambda run: None, lambda run: None, op)
    return replace(made, **changes)


def seeded(workload: Workload, device: torch.device, seed: int) -> tuple[torch.Tensor]:
    return (torch.randn(workload.shape["N"], generator=torch.Generator(device).manual_seed(seed)).requires_grad_(),)


def test_what_matches_is_timed():
    result = micro.run_micro(optimization_with(square), CPU, samples=4, ceilings=CEILINGS)
    row = result["workloads"]["tiny"]
    assert result["level"] == "BITWISE" and result["untimed"] is None
    assert row["reference_us"] > 0 and row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert row["tb_per_s"] == pytest.approx(4000 / row["candidate_us"] / 1e6)
    assert row["of_ceiling"] == pytest.approx(0.4 / row["candidate_us"])  # 4000 bytes at 10 GB/s
    assert row["forward_us"] > 0 and row["of_copies"] > 0


def test_what_arithmetic_bounds_is_not_held_to_copies():
    slow = replace(CEILINGS, matmul_flops_per_s=1e6)
    row = micro.run_micro(optimization_with(square), CPU, samples=4, ceilings=slow)["workloads"]["tiny"]
    assert row["of_copies"] is None and row["of_ceiling"] == pytest.approx(600 / row["candidate_us"])


def test_copies_move_the_bytes_in_two_launches(monkeypatch):
    sizes, calls = [], []
    monkeypatch.setattr(ceilings, "copy_of", lambda size, device: (sizes.append(size), lambda: calls.append(size))[1])
    assert micro.copies_us(4000, CPU, 3) > 0
    assert sizes == [1000] and len(calls) % 2 == 0


def test_what_does_not_match_is_not_timed():
    result = micro.run_micro(optimization_with(lambda x: 1.01 * square(x)), CPU, ceilings=CEILINGS)
    assert result["level"] == "FAILED" and "mean ratio" in result["untimed"]
    assert "reference_us" not in result["workloads"]["tiny"]
    json.dumps(result, allow_nan=False)


def test_an_infinite_error_ratio_is_still_json():
    result = micro.run_micro(optimization_with(lambda x: square(x) * torch.full((), float("nan"))), CPU, ceilings=CEILINGS)
    assert result["level"] == "FAILED"
    json.dumps(result, allow_nan=False)


def test_triton_without_a_gpu_is_checked_and_not_timed(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = micro.run_micro(optimization_with(square, needs=Needs(triton=True)), CPU)
    assert result["level"] == "BITWISE" and result["untimed"] == micro.INTERPRETED


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"op": None}, "no op of its own"),
        ({"needs": Needs(cuda=True)}, "CUDA"),
        ({"needs": Needs(packages=("no_such",))}, "no_such"),
    ],
)
def test_what_cannot_run_says_why(changes, words):
    result = micro.run_micro(optimization_with(square, **changes), CPU)
    assert result["level"] == "NOT_RUN" and words in result["untimed"]


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"'nope'.*silu_mul"):
        micro.main(["--optimization", "nope", "--device", "cpu"])
    with pytest.raises(UserError, match=r"there are: .*silu_mul"):
        micro.main(["--device", "cpu"])


@pytest.mark.parametrize(("candidate", "code"), [(square, 0), (lambda x: square(x) + 1, 1)])
def test_the_command_ends_with_one_json_line(candidate, code, monkeypatch, capsys):
    monkeypatch.setattr(registry, "discover", lambda: {"squares": optimization_with(candidate)})
    monkeypatch.setattr("bench.ceilings.measure_ceilings", lambda device: CEILINGS)
    assert micro.main(["--optimization", "squares", "--device", "cpu", "--samples", "3"]) == code
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert ("ratio" in result["workloads"]["tiny"]) is (code == 0)
    assert ("error: squares not timed: FAILED" in printed.err) is (code == 1)


@pytest.mark.parametrize("interrupted", [False, True])
def test_several_are_measured_one_after_another(interrupted, monkeypatch, capsys, tmp_path):
    """What the device can do is measured once; one that does not match stops nobody; an interrupt keeps what there is."""
    asked = []
    monkeypatch.setattr("bench.ceilings.measure_ceilings", lambda device: asked.append(device) or CEILINGS)

    def stopped(x: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    sides = {"right": square, "wrong": lambda x: square(x) + 1, "late": stopped if interrupted else square}
    known = {name: replace(optimization_with(side), name=name) for name, side in sides.items()}
    monkeypatch.setattr(registry, "discover", lambda: known)
    flags = ["--device", "cpu", "--samples", "3", "--json", "--record", "--reports", str(tmp_path)]
    names = ["right", "wrong", "late", "right"]
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            micro.main(["--optimization", *names, *flags])
    else:
        assert micro.main(["--optimization", *names, *flags]) == 1
    printed = capsys.readouterr()
    results = [json.loads(line) for line in printed.out.splitlines()]
    there = [("right", "BITWISE"), ("wrong", "FAILED"), ("late", "BITWISE")][: 2 if interrupted else 3]
    assert [(result["optimization"], result["level"]) for result in results] == there and len(asked) == 1
    assert [record.result for record in micro_records.read(recorded(tmp_path))] == results
    assert ("error: wrong not timed: FAILED" in printed.err) is not interrupted
    assert differences(tmp_path / "data", tmp_path) == []


@pytest.fixture
def command(monkeypatch):
    """Runs `python -m bench.micro` on one side of squares and returns its exit status."""
    monkeypatch.setattr("bench.ceilings.measure_ceilings", lambda device: CEILINGS)

    def run(candidate, *flags: str) -> int:
        monkeypatch.setattr(registry, "discover", lambda: {"squares": optimization_with(candidate)})
        return micro.main(["--optimization", "squares", "--device", "cpu", "--samples", "3", *flags])

    return run


def recorded(reports: Path) -> Path:
    return reports / "data" / "micro" / f"{device_slug(CPU)}.jsonl"


@pytest.mark.parametrize(("candidate", "code"), [(square, 0), (lambda x: square(x) + 1, 1)])
def test_a_result_is_kept_and_rendered(candidate, code, command, tmp_path, capsys):
    assert command(candidate, "--record", "--reports", str(tmp_path)) == code
    (line,) = recorded(tmp_path).read_text(encoding="utf-8").splitlines()
    row = json.loads(line)
    assert set(row) == {"schema", "finished_at", "command", "environment", "result"} and row["schema"] == 1
    assert row["result"] == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["environment"] == describe(CPU) and str(tmp_path) not in line
    assert row["command"] == "python -m bench.micro --optimization squares --device cpu --samples 3 --record"
    assert datetime.fromisoformat(row["finished_at"]).utcoffset() == timedelta(0)
    assert differences(tmp_path / "data", tmp_path) == []
    assert "`squares`" in (tmp_path / "micro" / "README.md").read_text(encoding="utf-8")


def test_each_result_is_another_line(command, tmp_path):
    for candidate in (square, lambda x: square(x) + 1):
        command(candidate, "--record", f"--reports={tmp_path}")
    levels = [record.result["level"] for record in micro_records.read(recorded(tmp_path))]
    assert levels == ["BITWISE", "FAILED"]


def test_nothing_is_written_unless_asked(command, tmp_path, monkeypatch):
    monkeypatch.setattr(micro_records, "recorder", lambda *given: pytest.fail("recorded"))
    assert command(square, "--reports", str(tmp_path)) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_refused_before_anything_is_measured(command, tmp_path, monkeypatch):
    path = recorded(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text('{"schema": 1}\n', encoding="utf-8")
    monkeypatch.setattr(micro, "run_micro", lambda *given, **named: pytest.fail("measured"))
    with pytest.raises(UserError, match=r"\.jsonl:1: not a valid record: no key 'finished_at'"):
        command(square, "--record", "--reports", str(tmp_path))
    assert path.read_text(encoding="utf-8") == '{"schema": 1}\n'
    with pytest.raises(UserError, match="a folder to write to is expected"):
        command(square, "--record", "--reports", str(path))


def test_a_record_holds_no_time_of_what_does_not_match(command, tmp_path):
    command(square, "--record", "--reports", str(tmp_path))
    (record,) = micro_records.read(recorded(tmp_path))
    with pytest.raises(ValueError, match="what does not match its reference holds no time"):
        replace(record, result=record.result | {"level": "FAILED"})


def test_only_one_command_renders_at_a_time(command, tmp_path, monkeypatch):
    entered = []

    @contextmanager
    def watched(folder):
        entered.append(folder)
        yield

    monkeypatch.setattr("bench.claims.alone_in", watched)
    command(square, "--record", "--reports", str(tmp_path))
    assert entered == [tmp_path / "data"]


def test_the_table_shows_ratio_and_interval():
    result = micro.run_micro(optimization_with(square), CPU, samples=4, ceilings=CEILINGS)
    result["workloads"]["tiny"] |= {"ratio": 1.5, "ratio_low": 1.4, "ratio_high": 1.6}
    console = Console(width=180)
    with console.capture() as capture:
        console.print(micro.table(result))
    assert "1.50 [1.40, 1.60]" in capture.get()


def test_the_interval_is_seeded_and_holds_the_median():
    noise = np.random.default_rng(1).normal(1.0, 0.05, 200)
    once, twice = (ratio_interval(2.0 * noise, np.ones(200), seed=3) for _ in range(2))
    assert once == twice
    ratio, low, high = once
    assert low <= ratio <= high and high - low < 0.05
    assert ratio == pytest.approx(2.0, rel=0.02)


def test_sides_are_timed_in_turn():
    calls = []
    timing = time_pair(lambda: calls.append("r"), lambda: calls.append("c"), CPU, samples=4, warmup=1)
    assert "".join(calls) == "rc" + "rccrrccr"
    assert len(timing.reference_samples_us) == len(timing.candidate_samples_us) == 4
    with pytest.raises(ValueError, match="at least 2"):
        time_pair(lambda: None, lambda: None, CPU, samples=1)
