"""`python -m bench.profile` on the tiny model on a CPU, in a process of its own, and what it says of mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.profile import __main__ as command
from bench.profile import records, stacks
from bench.report import differences
from loop.cli import guarded
from loop.device import device_slug
from loop.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--device", "cpu", "--data.pack-length", "256", "--data.max-examples", "80", "--steps", "2", "--traced", "1",
    "--warmup", "1", "--micro-batches", "1",
)  # fmt: skip
SET = ("keep_activations", "supervised_logits")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}


def words(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "bench.profile", *SMALL, *arguments]


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, dict[str, Any], str]:
    """Reports, the JSON document and stderr of a profile of a set."""
    reports = tmp_path_factory.mktemp("profile") / "reports"
    asked = words("--optimizations", *SET, "--stack-seconds", "1", "--record", "--reports", str(reports))
    finished = subprocess.run(asked, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
    return reports, json.loads(finished.stdout.splitlines()[-1]), finished.stderr


def test_the_document_says_where_the_time_goes(done):
    _, result, _ = done
    assert result["enabled"] == list(SET) and result["refused"] == {} and result["data"]["real_tokens"] > 0
    for name in records.PHASES:
        phase = result["phases"][name]
        assert 0 < phase["wall_low_s"] <= phase["wall_s"] <= phase["wall_high_s"] and phase["busy_s"] is None
        assert 0 < sum(phase["groups"].values()) <= 1.02 * phase["traced_wall_s"]
    micro_step = result["phases"]["micro_step"]["groups"]
    assert micro_step["matrix"] > 0 and set(result["phases"]["update"]["groups"]) == {"optimizer"}
    assert {"frames", "nodes"}.isdisjoint(result["stacks"])


@pytest.mark.parametrize("phase", ["micro_step", "step"])
def test_next_to_nothing_is_other(done, phase):
    groups = done[1]["phases"][phase]["groups"]
    others = [row["name"] for row in done[1]["phases"][phase]["names"] if row["group"] == "other"]
    assert groups.get("other", 0.0) < 0.03 * sum(groups.values()), others


def test_the_record_is_the_result_without_a_path_of_this_machine(done):
    reports, result, _ = done
    (path,) = (reports / "data" / "profile").iterdir()
    (record,) = records.read(path)
    kept = record.result | {"stacks": {}}
    assert kept == result | {"stacks": {}} and record.result["recipe"]["data"]["pack_length"] == 256
    assert record.command.startswith("python -m bench.profile --device cpu") and "--reports" not in record.command
    for file in (path, *(reports / "profile").rglob("*.svg"), reports / "profile" / "README.md"):
        text = file.read_text(encoding="utf-8")
        assert str(ROOT) not in text and sys.prefix not in text and str(Path.home()) + "/" not in text
    assert "missing" in record.result["stacks"] or record.result["stacks"]["frames"][0] == stacks.FIRST


def test_the_reports_are_rendered_from_it(done):
    reports, result, _ = done
    assert differences(reports / "data", reports) == []
    page = (reports / "profile" / "README.md").read_text(encoding="utf-8")
    assert "`keep_activations` + `supervised_logits`" in page
    assert "](profile/README.md)" in (reports / "README.md").read_text(encoding="utf-8")
    drawn = list((reports / "profile").rglob("*.svg"))
    assert len(drawn) == ("missing" not in result["stacks"]) and all(path.stat().st_size < 300_000 for path in drawn)


def test_the_tables_go_to_stderr(done):
    err = done[2]
    assert "A micro-step by what it does" in err and "Memory by owner" in err and "matrix products" in err


MISTAKES = {
    "a name that nobody knows": (["--optimizations", "nope"], "no optimization is named 'nope'; there are: "),
    "one that Triton would interpret": (["--optimizations", "silu_mul"], "silu_mul runs in Triton's interpreter on a CPU"),
    "both ways of saying it": (["--shipping", "--optimizations", "static_lora"], "leave --optimizations out"),
    "no steps": (["--steps", "0"], "--steps is 0; it must be at least 1"),
    "no trace": (["--traced", "0"], "--traced is 0; it must be at least 1"),
    "no micro-batch": (["--micro-batches", "0"], "--micro-batches is 0"),
    "no warm-up": (["--warmup", "0"], "--warmup is 0"),
    "less than no time": (["--stack-seconds", "-1"], "--stack-seconds is -1.0; it must be at least 0"),
    "no number": (["--stack-seconds", "nan"], "--stack-seconds is nan"),
    "an output folder": (["--output", "runs/x"], "--output and --resume are for python -m loop.train"),
    "an unknown flag": (["--no-such-flag"], "no-such-flag"),
    "no such model": (["--model", "./absent"], "./absent"),
    "no such data": (["--data", "absent.jsonl"], "absent.jsonl"),
    "a GPU that is not there": (["--device", "cuda"], "torch sees no CUDA device"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "said"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_name_what_is_wrong(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench.profile", *SMALL, *arguments, "--reports", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        guarded(command.main)
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == ""
    errors = [line for line in printed.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and said in errors[0]
    assert not list(tmp_path.rglob("*"))


def test_a_damaged_record_is_named_before_anything_is_measured(done, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_profile", lambda *given: pytest.fail("measured"))
    (kept,) = (done[0] / "data" / "profile").iterdir()
    copied = tmp_path / "data" / "profile" / kept.name
    copied.parent.mkdir(parents=True)
    copied.write_bytes(kept.read_bytes() + b'{"half": a rec\n')
    with pytest.raises(UserError, match=r"\.jsonl:2: not a valid record"):
        command.main([*SMALL, "--record", "--reports", str(tmp_path)])
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"--reports .*; a folder to write to is expected"):
        command.main([*SMALL, "--record", "--reports", str(tmp_path / "file")])


def test_what_ships_is_profiled_and_called_so(tmp_path, monkeypatch, capsys):
    import torch

    asked = []
    monkeypatch.setattr(command, "_profile", lambda given, names, dtype: asked.append(names) or {"stacks": {}})
    monkeypatch.setattr(command, "_show", lambda result: None)
    folder = tmp_path / device_slug(torch.device("cpu"))
    folder.mkdir()
    setting = 'model = "qwen3.5-tiny"\nmethod = "lora"\ndtype = "float32"\npack_length = 512\nenable = ["static_lora"]\n'
    (folder / "shipping.toml").write_text(f"schema = 2\n[[setting]]\n{setting}", encoding="utf-8")
    command.main([*SMALL, "--shipping", "--reports", str(tmp_path)])
    command.main([*SMALL, "--shipping", "--method", "full", "--reports", str(tmp_path)])
    assert asked == [("static_lora",), ()]
    said = capsys.readouterr().err
    assert "shipping static_lora: passed the gate and paid" in said and "shipping nothing" in said


def test_ctrl_c_leaves_no_half_file(tmp_path):
    process = subprocess.Popen(
        words("--stack-seconds", "60", "--record", "--reports", str(tmp_path)), cwd=ROOT, env=ENVIRONMENT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    for line in process.stderr:
        if "sampling host stacks" in line:
            break
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and err.splitlines()[-1] == "interrupted"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
