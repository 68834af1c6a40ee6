"""The command's manners: flags and recipes reach the run, and every mistake of the user's is one line and exit code 2."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loop.cli import guarded, parse
from loop.config import Config
from loop.device import device_slug
from loop.errors import UserError
from loop.train import Command, main

ROOT = Path(__file__).resolve().parents[2]


def call(argv: list[str], capsys) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command, in this process."""
    with pytest.raises(SystemExit) as stop:
        guarded(lambda: main(argv))
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def one_error(code: int, out: str, err: str) -> str:
    """The error's line; everything that must hold of a mistake is asserted here."""
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert "Traceback" not in err and "\x1b" not in err
    return err


def test_a_run_says_what_it_did(flags, tmp_path, capsys):
    code, out, err = call(flags("--steps", "2", "--enable", "static_lora"), capsys)
    assert code == 0, err
    result = json.loads(out)
    assert out.count("\n") == 1
    assert result["steps"] == 2 and result["enabled"] == ["static_lora"] and result["refused"] == {}
    assert result["output"] == str(tmp_path / "out") and result["data"]["documents"] == 48
    assert result["interrupted"] is False
    lines = err.splitlines()
    assert lines[0].startswith("qwen3-tiny, lora, float32 on ")
    steps = [re.fullmatch(r"step (\d)/2  loss (\S+)  grad norm .* real tok/s .* s", line) for line in lines[1:3]]
    assert [step and step[1] for step in steps] == ["1", "2"]
    assert f"{result['final_loss']:.4f}" == steps[1][2]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "log.jsonl", "training_state.safetensors"
    }  # fmt: skip


def test_the_short_form_enables_what_shipping_toml_allows(flags, tmp_path, capsys):
    slug = device_slug(torch.device("cpu"))
    folder = tmp_path / "reports" / slug
    folder.mkdir(parents=True)
    (folder / "shipping.toml").write_text(
        'schema = 2\n[[setting]]\nmodel = "qwen3-tiny"\nmethod = "lora"\ndtype = "float32"\n'
        'enable = ["static_lora", "supervised_logits"]\n'
    )
    code, out, err = call(flags(), capsys)
    assert code == 0 and json.loads(out)["enabled"] == ["static_lora", "supervised_logits"]
    first = err.splitlines()[0]
    assert first == f"shipping static_lora, supervised_logits: passed the gate and paid on {slug} ({slug}/shipping.toml)"


def test_the_short_form_without_a_report_says_so(flags, capsys):
    code, out, err = call(flags(), capsys)
    assert code == 0 and json.loads(out)["enabled"] == []
    assert err.startswith("shipping nothing: no cpu-") and "python -m bench.run" in err.splitlines()[0]


def test_what_is_refused_is_said(flags, capsys):
    code, out, err = call(flags("--enable", "keep_activations"), capsys)
    assert code == 0 and json.loads(out)["enabled"] == []
    assert err.index("not enabled: keep_activations: ") < err.index("step 1/1")


def test_skipped_examples_are_said(flags, chats, tmp_path, capsys):
    path = tmp_path / "some.jsonl"
    path.write_text(chats.read_text() + "{broken\n")
    code, out, err = call(flags("--data", str(path), "--data.on-bad-example", "skip"), capsys)
    assert code == 0 and sum(json.loads(out)["data"]["skipped"].values()) == 1
    assert "skipped examples: {" in err


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('steps = 7\ngrad_accum = 3\nenable = ["silu_mul"]\n[lora]\nrank = 5\ntargets = ["q_proj", "v_proj"]\n')
    for argv in (["--recipe", str(recipe), "--steps", "9"], ["--steps", "9", f"--recipe={recipe}"]):
        command = parse(Command(), "prog", "about", argv)
        assert (command.steps, command.grad_accum, command.lora.rank) == (9, 3, 5)
        assert command.lora.targets == ("q_proj", "v_proj") and command.enable == ("silu_mul",)
        assert command.seed == Config().seed


def test_help_is_no_error(capsys):
    code, out, err = call(["--help"], capsys)
    assert code == 0 and "--optim.lr" in out and "--data" in out and err == ""


def bad_line(tmp_path: Path, chats: Path) -> str:
    path = tmp_path / "bad.jsonl"
    lines = chats.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], '{"messages": [{"role": "user"', *lines[2:]]) + "\n")
    return str(path)


def bad_recipe(tmp_path: Path) -> str:
    path = tmp_path / "bad.toml"
    path.write_text("[optim]\nlearning_rate = 1\n")
    return str(path)


MISTAKES = {
    "data that are not there": (["--data", "{tmp}/none.jsonl"], "none.jsonl"),
    "data that are a folder": (["--data", "{tmp}"], "{tmp}"),
    "data with a bad line": (["--data", "{bad_line}"], "bad.jsonl:3: "),
    "a flag that is not there": (["--stepz", "3"], "--stepz"),
    "a flag without a value": (["--steps"], "--steps"),
    "a value that is no number": (["--steps", "many"], "many"),
    "a value out of range": (["--optim.beta1", "1.5"], "optim.beta1 is 1.5; it must be at least 0 and below 1"),
    "no steps": (["--steps", "0"], "steps is 0; it must be positive"),
    "an unknown choice": (["--method", "qlora"], "qlora"),
    "a recipe's unknown key": (
        ["--recipe", "{bad_recipe}"],
        "bad.toml: unknown key optim.learning_rate; known here: optim.lr",
    ),
    "a recipe that is not there": (["--recipe", "{tmp}/none.toml"], "none.toml: no such file"),
    "a recipe without a name": (["--recipe"], "--recipe needs a file"),
    "a model path that is not there": (["--model", "{tmp}/none"], "none: no such folder"),
    "a model name that is not there": (["--model", "qwen9-tiny"], "the named shapes are qwen3.5-tiny"),
    "a model folder that is empty": (["--model", "{tmp}"], "config.json"),
    "an unknown optimization": (["--enable", "warp_drive"], "no optimization is named 'warp_drive'; there are: "),
    "an output that is a file": (["--output", "{file}"], "is a file; a folder is expected"),
    "targets that match nothing": (["--lora.targets", "query"], "lora.targets ['query'] match no projection"),
    "adapters that are not there": (["--lora.start-from", "{tmp}/none"], "adapter_model.safetensors is not there"),
    "nothing to resume": (["--resume"], "nothing to resume"),
    "a pack that is too short": (["--data.pack-length", "8"], "chats.jsonl:1: "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(flags, chats, tmp_path, capsys, mistake):
    extra, expected = MISTAKES[mistake]
    (tmp_path / "file").write_text("")
    names = {
        "tmp": tmp_path, "file": tmp_path / "file", "bad_line": bad_line(tmp_path, chats), "bad_recipe": bad_recipe(tmp_path)
    }  # fmt: skip
    code, out, err = call(flags(*(part.format(**names) for part in extra)), capsys)
    assert expected.format(**names) in one_error(code, out, err)


def test_a_loss_that_is_no_number_is_one_line_after_the_steps(flags, capsys):
    code, out, err = call(flags("--steps", "9", "--optim.lr", "1e30", "--optim.warmup-steps", "0"), capsys)
    *before, last = err.splitlines()
    assert (code, out) == (2, "") and re.match(r"error: step 1\b.* micro_batches\(step=1\)", last)
    assert before[-1].startswith("step 1/9 ") and not any(line.startswith("error") for line in before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_device_that_is_not_there(flags, capsys):
    assert "--device cuda: torch sees no CUDA device" in one_error(*call(flags("--device", "cuda"), capsys))


def test_a_damaged_shipping_file(flags, tmp_path, capsys):
    folder = tmp_path / "reports" / device_slug(torch.device("cpu"))
    folder.mkdir(parents=True)
    (folder / "shipping.toml").write_text("enable = [")
    assert "shipping.toml: not a shipping file" in one_error(*call(flags(), capsys))


@pytest.mark.parametrize(("extra", "expected"), [(["--stepz", "3"], "--stepz"), (["--data", "none.jsonl"], "none.jsonl")])
def test_a_mistake_is_one_line_in_a_shell_too(flags, extra, expected):
    command = [sys.executable, "-m", "loop.train", *flags(*extra)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert expected in one_error(result.returncode, result.stdout, result.stderr)


@pytest.mark.parametrize(
    ("outcome", "code", "text"),
    [
        (UserError("two\n  lines"), 2, "error: two lines\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_the_guard_turns_each_outcome_into_its_exit_code(capsys, outcome, code, text):
    def fail() -> int:
        raise outcome

    with pytest.raises(SystemExit) as stop:
        guarded(fail)
    assert (stop.value.code, capsys.readouterr().err) == (code, text)


def test_the_guard_lets_bugs_through():
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 // 0)
