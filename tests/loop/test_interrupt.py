"""Ctrl-C and kill -9, on real processes: what is on disk can always go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from loop.checkpoint import STATE_FILE
from loop.cli import guarded
from loop.interrupt import deferred_interrupt
from loop.train import main
from loop.training import LOG_FILE, train

ROOT = Path(__file__).resolve().parents[2]


def start(flags: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "loop.train", *flags, "--steps", "100000"]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for_steps(process: subprocess.Popen, folder: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / LOG_FILE).exists() and len((folder / LOG_FILE).read_text().splitlines()) >= count:
            return
        time.sleep(0.02)
    process.kill()
    pytest.fail(f"no {count} steps: {process.communicate()[1]}")


def steps_logged(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / LOG_FILE).read_text().splitlines()]


def go_on(flags: list[str], steps: int) -> None:
    with pytest.raises(SystemExit) as stop:
        guarded(lambda: main([*flags, "--resume", "--steps", str(steps)]))
    assert stop.value.code == 0


def test_ctrl_c_saves_the_last_step_and_resume_goes_on(flags, tmp_path):
    folder = tmp_path / "out"
    process = start(flags("--save-every", "100000"))
    wait_for_steps(process, folder, 3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    done = steps_logged(folder)
    assert [line for line in err.splitlines() if "interrupt" in line] == [
        f"interrupted after step {len(done)}; --resume --output {folder} goes on"
    ]
    assert json.loads(out)["interrupted"] is True and json.loads(out)["steps"] == len(done)

    go_on(flags("--save-every", "100000"), len(done) + 2)
    assert steps_logged(folder) == list(range(len(done) + 2)), "no step twice, none left out"


def test_kill_9_leaves_a_state_that_goes_on(flags, tmp_path):
    """Full fine-tuning, whose state takes longest to write, so that the signal may well strike in a write."""
    folder = tmp_path / "out"
    process = start(flags("--method", "full"))
    wait_for_steps(process, folder, 4)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    saved = int(load_file(folder / STATE_FILE)["step.model.embed_tokens.weight"])
    assert len(steps_logged(folder)) - saved in (0, 1), "at most the step in flight is lost"
    go_on(flags("--method", "full"), saved + 1)
    assert steps_logged(folder) == list(range(saved + 1))


def test_ctrl_c_before_the_first_save_says_that_nothing_is_there(flags, capsys, monkeypatch):
    from loop import training

    def interrupted_step(run, dataset, step):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train_step", interrupted_step)
    with pytest.raises(SystemExit) as stop:
        guarded(lambda: main(flags()))
    out, err = capsys.readouterr()
    assert stop.value.code == 130 and json.loads(out)["final_loss"] is None
    assert err.splitlines()[-1] == "interrupted after no step; nothing was saved yet"


def test_full_weights_are_saved_between_steps_only(make, tmp_path):
    """Ctrl-C after a step leaves that step's weights; an interrupt from within one leaves none, for they may be torn."""

    def within_the_second(step) -> None:
        if step.step == 1:
            raise KeyboardInterrupt

    def after_the_second(step) -> None:
        if step.step == 1:
            signal.raise_signal(signal.SIGINT)

    for name, on_step, saved, step in (("torn", within_the_second, False, 1), ("whole", after_the_second, True, 2)):
        log = train(make(method="full", output=tmp_path / name), on_step=on_step)
        assert log.interrupted and len(log.steps) == 2
        assert (tmp_path / name / "model.safetensors").exists() is saved
        assert int(load_file(tmp_path / name / STATE_FILE)["step.model.embed_tokens.weight"]) == step


def test_the_first_ctrl_c_is_noted_and_the_second_raises():
    with pytest.raises(KeyboardInterrupt), deferred_interrupt() as asked:
        assert not asked()
        signal.raise_signal(signal.SIGINT)
        assert asked()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_callers_own_stays():
    seen = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with deferred_interrupt() as asked:
            signal.raise_signal(signal.SIGINT)
        assert seen == [signal.SIGINT] and not asked()
    finally:
        signal.signal(signal.SIGINT, before)


def test_training_in_another_thread_works(make):
    logs = []
    thread = threading.Thread(target=lambda: logs.append(train(make(steps=1))))
    thread.start()
    thread.join()
    assert len(logs) == 1 and len(logs[0].steps) == 1
