"""A run that stops and goes on is the run that never stopped; what cannot go on says why; no file is ever half written."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from loop_truth import worst_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loop import files
from loop.checkpoint import STATE_FILE
from loop.config import Config
from loop.errors import UserError
from loop.lora import ADAPTER_FILE
from loop.training import LOG_FILE, RunLog, build, train


def stop_after(steps: int):
    """An `on_step` that ends the run once `steps` steps were reported; that last one is not saved yet."""
    seen = []

    def on_step(step) -> None:
        seen.append(step)
        if len(seen) > steps:
            raise KeyboardInterrupt

    return on_step


def in_two_parts(config: Config, folder: Path, first: int, **options) -> tuple[RunLog, RunLog]:
    config = dataclasses.replace(config, output=folder)
    stopped = train(config, on_step=stop_after(first), **options)
    torch.rand(5)
    return stopped, train(dataclasses.replace(config, resume=True), **options)


def logged(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


CASES = {
    "lora": {"lora": {"dropout": 0.0}},
    "lora with dropout": {"lora": {"dropout": 0.3}, "grad_accum": 2},
    "lora in bf16 with dropout": {"lora": {"dropout": 0.3}, "dtype": "bfloat16"},
    "hybrid": {"model": "qwen3.5-shallow-tiny", "lora": {"dropout": 0.3}},
    "full": {"method": "full"},
    "full in bf16": {"method": "full", "dtype": "bfloat16", "model": "qwen3.5-shallow-tiny"},
}


@pytest.mark.parametrize("case", CASES)
def test_six_steps_are_three_and_three_more(make, tmp_path, case):
    config = make(steps=6, **CASES[case])
    whole = train(dataclasses.replace(config, output=tmp_path / "whole"))
    stopped, resumed = in_two_parts(config, tmp_path / "parts", 3)
    assert stopped.interrupted and not resumed.interrupted and [step.step for step in resumed.steps] == [3, 4, 5]
    assert whole.losses == stopped.losses[:3] + resumed.losses
    assert [s.grad_norm for s in whole.steps[3:]] == [s.grad_norm for s in resumed.steps]
    one, two = (load_file(tmp_path / folder / STATE_FILE) for folder in ("whole", "parts"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    kinds = {key.partition(".")[0] for key in one}
    assert kinds == {"master", "exp_avg", "exp_avg_sq", "step", "rng"}
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts") == list(enumerate(whole.losses))
    if config.method == "lora":
        one, two = (load_file(tmp_path / folder / ADAPTER_FILE) for folder in ("whole", "parts"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_steps_after_the_last_checkpoint_are_done_again(make, tmp_path):
    """save_every 2, stopped after 3: steps 0 and 1 are on disk, and the log holds each step once."""
    config = make(steps=5, save_every=2)
    _, resumed = in_two_parts(config, tmp_path / "run", 3)
    assert [step.step for step in resumed.steps] == [2, 3, 4]
    assert logged(tmp_path / "run") == list(enumerate(train(config).losses))


def test_a_log_cut_off_within_a_line_is_mended(make, tmp_path):
    config = make(steps=4, output=tmp_path)
    train(config, on_step=stop_after(2))
    with (tmp_path / LOG_FILE).open("a") as file:
        file.write('{"step": 1, "lo')
    train(dataclasses.replace(config, resume=True))
    assert [step for step, _ in logged(tmp_path)] == [0, 1, 2, 3]


def test_another_optimization_may_go_on(make, tmp_path):
    config = make(steps=4, output=tmp_path, lora={"dropout": 0.2})
    train(config, on_step=stop_after(2))
    resumed = train(dataclasses.replace(config, resume=True), ("static_lora",))
    assert resumed.losses == train(dataclasses.replace(config, output=None)).losses[2:]


@pytest.fixture
def finished(make, tmp_path) -> Config:
    config = make(steps=1, output=tmp_path / "run")
    train(config)
    return dataclasses.replace(config, steps=2, resume=True)


def spoil(config: Config, change) -> None:
    """Rewrites the state file with `change(tensors, metadata)`."""
    path = config.output / STATE_FILE
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, path, metadata or None)


def truncate(config: Config) -> None:
    path = config.output / STATE_FILE
    path.write_bytes(path.read_bytes()[:-100])


MASTER = "master.model.layers.0.self_attn.q_proj.lora_A.weight"
MOMENT = MASTER.replace("master.", "exp_avg_sq.")
DAMAGES = {
    "empty": (lambda c: (c.output / STATE_FILE).write_bytes(b""), "is damaged"),
    "noise": (lambda c: (c.output / STATE_FILE).write_bytes(b"not safetensors at all" * 9), "is damaged"),
    "cut off": (truncate, "is damaged"),
    "no metadata": (lambda c: spoil(c, lambda t, m: m.clear()), "is damaged: it lacks 'next_step'"),
    "no step": (lambda c: spoil(c, lambda t, m: m.update(next_step="three")), "is damaged: .*'three'"),
    "no settings": (lambda c: spoil(c, lambda t, m: m.update(config="{")), "is damaged"),
    "tensor missing": (lambda c: spoil(c, lambda t, m: t.pop(MASTER)), f"is damaged: it lacks {MASTER}"),
    "moment missing": (lambda c: spoil(c, lambda t, m: t.pop(MOMENT)), f"is damaged: it lacks {MOMENT}"),
    "misshapen moment": (
        lambda c: spoil(c, lambda t, m: t.update({MOMENT: torch.zeros(2)})),
        r"has shape \[2\]; this run's",
    ),
    "rng missing": (lambda c: spoil(c, lambda t, m: t.pop("rng.cpu")), "is damaged: it lacks rng.cpu"),
    "misshapen": (lambda c: spoil(c, lambda t, m: t.update({MASTER: torch.zeros(4, 5)})), r"has shape \[4, 5\]; this run's"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_named(finished, damage):
    change, message = DAMAGES[damage]
    change(finished)
    with pytest.raises(UserError, match=message) as error:
        train(finished)
    assert str(finished.output / STATE_FILE) in str(error.value) and "--resume" in str(error.value)


def test_another_configuration_is_named_key_by_key(finished):
    other = dataclasses.replace(
        finished, grad_accum=2, lora=dataclasses.replace(finished.lora, dropout=0.5), save_every=7, device="auto"
    )
    with pytest.raises(
        UserError, match=r"another configuration: grad_accum was 1 and is 2, lora\.dropout was 0\.0 and is 0\.5$"
    ):
        train(other)


def test_other_data_under_the_same_name_are_noticed(make, tmp_path, chats):
    path = tmp_path / "mine.jsonl"
    shutil.copy(chats, path)
    config = make(steps=1, output=tmp_path / "run", data={"path": path})
    train(config)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match="was trained on other data"):
        train(dataclasses.replace(config, steps=2, resume=True))


def test_output_mistakes_are_named_before_any_work(make, tmp_path, finished):
    (tmp_path / "file").write_text("")
    for config, message in (
        (dataclasses.replace(finished, resume=False), "already holds a run; add --resume"),
        (make(output=tmp_path / "new", resume=True), "nothing to resume"),
        (make(resume=True), "--resume needs --output"),
        (make(output=tmp_path / "file"), "is a file; a folder is expected"),
        (make(output=tmp_path / "file" / "below"), "--output .*below: Not a directory"),
        (make(output=Path("/proc/self/nothing")), "--output /proc/self/nothing: "),
        (make(output=Path("/proc/self")), "--output /proc/self: "),
    ):
        with pytest.raises(UserError, match=message):
            train(config)


def test_full_fine_tuning_saves_what_transformers_loads(make, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = make(model="qwen3.5-shallow-tiny", method="full", steps=2, output=tmp_path)
    train(config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    state = load_file(tmp_path / STATE_FILE)
    assert type(model).__name__ == "Qwen3_5ForCausalLM"
    named = dict(model.named_parameters())
    assert {f"master.{name}" for name in named} == {key for key in state if key.startswith("master.")}
    assert all(torch.equal(state[f"master.{name}"], parameter.detach()) for name, parameter in named.items())
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template


def test_a_saved_folder_is_a_model_for_the_loop(make, tmp_path):
    config = make(method="full", steps=2, output=tmp_path)
    train(config)
    run, dataset = build(make(method="full", model=str(tmp_path)))
    trained, _ = build(dataclasses.replace(config, output=None))
    trained.optimizer.load_state(load_file(tmp_path / STATE_FILE))
    batch = dataset.micro_batches(0, 1, 1)[0]
    losses = [float(one.micro_step(one, batch, batch.supervised_tokens)) for one in (run, trained)]
    assert losses[0] == losses[1]
    assert worst_error(run.optimizer.gradients(), trained.optimizer.gradients())[0] == 0


def test_a_write_that_fails_leaves_the_old_file(finished, monkeypatch):
    def half_written(tensors, path, metadata=None) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    names = (STATE_FILE, ADAPTER_FILE)
    before = {name: (finished.output / name).read_bytes() for name in names}
    monkeypatch.setattr(files, "save_file", half_written)
    with pytest.raises(OSError, match="No space left"):
        train(finished)
    assert {name: (finished.output / name).read_bytes() for name in names} == before
    assert [entry for entry in os.listdir(finished.output) if entry.startswith(".")] == []
