"""A plan of commands on several GPUs: in order, side by side, in time, and none lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import session
from bench.peers import PEERS
from bench.plan import JOIN
from bench.session import ROOT, Ended, Session, Step, main, read_plan
from kernels.registry import discover
from loop.errors import UserError

MINUTE = 60.0


def python(name: str, code: str, gpu: int = 0, seconds: float = MINUTE) -> Step:
    return Step(name, gpu, ("python", "-c", code), seconds / MINUTE)


def plan(folder: Path, text: str) -> Path:
    path = folder / "plan.toml"
    path.write_text(text, encoding="utf-8")
    return path


def step(name: str, code: str, gpu: int = 0, minutes: float = 1) -> str:
    command = json.dumps(["python", "-c", code])
    return f'[[step]]\nname = "{name}"\ngpu = {gpu}\nminutes = {minutes}\ncommand = {command}\n'


def test_steps_of_a_gpu_are_in_order_and_a_failure_does_not_stop_the_next(tmp_path):
    note = "import os; open('{}', 'a').write(os.environ['CUDA_VISIBLE_DEVICES'] + '{} ')"
    steps = [
        python("one", note.format(tmp_path / "x", "a") + "; print('said'); raise SystemExit(3)", 2),
        python("two", note.format(tmp_path / "x", "b"), 2),
        Step("three", 2, ("no-such-command-at-all",), 1.0),
        python("four", note.format(tmp_path / "x", "c"), 2),
    ]
    ended = Session(steps, tmp_path / "logs").run()
    assert [(one.name, one.code, one.cut) for one in ended] == [
        ("one", 3, False), ("two", 0, False), ("three", 127, False), ("four", 0, False),
    ]  # fmt: skip
    assert (tmp_path / "x").read_text() == "2a 2b 2c "
    assert (tmp_path / "logs" / "one.log").read_text() == "said\n"
    assert "no-such-command-at-all" in (tmp_path / "logs" / "three.log").read_text()


def test_gpus_share_the_cores(tmp_path, monkeypatch):
    """One core is enough to see that a command is held to its lane's share, and that this process is not."""
    mine = os.sched_getaffinity(0)
    monkeypatch.setattr(session, "shares", lambda lanes: [{min(mine)}, set()][:lanes])
    code = "import os; print(sorted(os.sched_getaffinity(0)))"
    Session([python("one", code, 0), python("all", code, 1)], tmp_path / "logs").run()
    assert (tmp_path / "logs" / "one.log").read_text() == f"{[min(mine)]}\n"
    assert (tmp_path / "logs" / "all.log").read_text() == f"{sorted(mine)}\n"
    assert os.sched_getaffinity(0) == mine


@pytest.mark.parametrize(("cores", "lanes"), [(64, 4), (7, 2), (2, 3), (1, 1)])
def test_shares_of_cores_are_equal_and_apart(monkeypatch, cores, lanes):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(10, 10 + cores)), raising=False)
    found = session.shares(lanes)
    assert [len(share) for share in found] == [cores // lanes] * lanes
    assert len(set().union(*found)) == lanes * (cores // lanes)
    monkeypatch.delattr(os, "sched_getaffinity")
    assert session.shares(lanes) == [set()] * lanes


def test_gpus_work_side_by_side(tmp_path):
    """Each waits for what the other one writes."""
    meet = "import pathlib, time\npathlib.Path({!r}).touch()\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.01)"
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    steps = [python("one", meet.format(here, there), 0, 30), python("other", meet.format(there, here), 1, 30)]
    assert [one.code for one in Session(steps, tmp_path / "logs").run()] == [0, 0]


KEEPS = "import time\ntry:\n    print('begun', flush=True); time.sleep(60)\nexcept KeyboardInterrupt:\n    print('kept')"


def test_what_takes_too_long_is_interrupted_and_keeps_what_it_has(tmp_path):
    began = time.monotonic()
    steps = [python("long", KEEPS, seconds=1.5), python("next", "pass")]
    long, following = Session(steps, tmp_path / "logs").run()
    assert long.cut and following == Ended("next", 0, 0, following.seconds, cut=False)
    assert (tmp_path / "logs" / "long.log").read_text() == "begun\nkept\n" and time.monotonic() - began < 20


def test_what_does_not_heed_an_interrupt_is_ended_with_its_children(tmp_path, monkeypatch, gone):
    monkeypatch.setattr(session, "PATIENCE", 0.5)
    deaf = (
        "import signal, subprocess, sys, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\nprint(child.pid, flush=True)\n"
        "time.sleep(60)"
    )
    (ended,) = Session([python("deaf", deaf, seconds=2)], tmp_path / "logs").run()
    assert ended.cut and ended.code == -signal.SIGKILL
    child = int((tmp_path / "logs" / "deaf.log").read_text())
    assert gone(child, 10)


def test_the_session_ends_in_time_and_says_what_was_not_begun(tmp_path, capsys):
    text = step("long", KEEPS) + step("late", "pass") + step("quick", "print(1)", gpu=1)
    code = main([str(plan(tmp_path, text)), "--minutes", "0.04", "--logs", str(tmp_path / "logs")])
    said = capsys.readouterr()
    ended = {one["name"]: one for one in json.loads(said.out)}
    assert code == 1 and list(ended) == ["long", "late", "quick"]
    assert ended["long"]["cut"] and ended["late"]["code"] is None and ended["quick"]["code"] == 0
    assert "gpu 0, late: not begun, the session's time is over" in said.err and "gpu 1, quick: ended with 0" in said.err


def test_commands_of_a_session_in_the_background_of_a_script_can_be_interrupted(tmp_path):
    """There a shell has what it starts ignore interrupts, and whoever is started by that inherits it."""
    path = plan(tmp_path, step("long", KEEPS, minutes=0.04))
    words = [sys.executable, "-m", "bench.session", str(path), "--logs", str(tmp_path / "logs")]
    script = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *words]
    began = time.monotonic()
    with subprocess.Popen(script, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        log = tmp_path / "logs" / "long.log"
        while not (log.exists() and log.read_text()) and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)  # the session itself goes on ignoring it
        (ended,) = json.loads(process.communicate(timeout=60)[0])
    assert ended["cut"] and ended["code"] == 0 and log.read_text() == "begun\nkept\n"
    assert time.monotonic() - began < 20


def test_ctrl_c_interrupts_what_is_at_work_and_begins_nothing_else(tmp_path):
    path = plan(tmp_path, step("long", KEEPS) + step("late", "print('late')"))
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.session", str(path), "--logs", str(tmp_path / "logs")], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ),
    )  # fmt: skip
    log = tmp_path / "logs" / "long.log"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, words = process.communicate(timeout=60)
    assert process.returncode == 130 and words.rstrip().endswith("interrupted")
    assert log.read_text() == "begun\nkept\n" and not (tmp_path / "logs" / "late.log").exists()


GOOD = '[[step]]\nname = "a"\ngpu = 0\nminutes = 1\ncommand = ["true"]\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "tables [[step]] are expected"), ("step = 3", "tables [[step]] are expected"),
        ("minutes = 3\n" + GOOD, "tables [[step]] are expected"), ("[[step", "plan.toml: "),
        (GOOD + GOOD, "two steps are called a"), (GOOD.replace("gpu = 0\n", ""), "step 1: the keys name, gpu, command"),
        (GOOD + "more = 1\n", "the keys name, gpu, command"), (GOOD.replace('"a"', '"../a"'), "name '../a'"),
        (GOOD.replace("gpu = 0", "gpu = true"), "gpu is True"), (GOOD.replace("gpu = 0", "gpu = -1"), "gpu must be"),
        (GOOD.replace("minutes = 1", "minutes = 0"), "above 0"), (GOOD.replace("minutes = 1", "minutes = inf"), "above 0"),
        (GOOD.replace('"true"', '"{no}"'), "step 1: {no}: [words] has no no"), ("words = 3\n" + GOOD, "[words]: a word, or"),
        (GOOD + "[words]\na = 3\n", "[words]: a word, or"), (GOOD + "[words]\na = ['b', 3]\n", "[words]: a word, or"),
        (GOOD.replace('"true"', '"{a}"') + "[words]\na = []\n", "a list of words"),
        ("words_of = 3\n" + GOOD, "words_of 3: the name of a file beside"),
        ('words_of = "../x.toml"\n' + GOOD, "words_of '../x.toml': the name of a file beside"),
        ('words_of = "none.toml"\n' + GOOD, "none.toml: no such file"),
        ('words_of = "plan.toml"\n' + GOOD, "plan.toml: [words]: a word, or"),
        (GOOD.replace('["true"]', "[]"), "a list of words"), (GOOD.replace('["true"]', "[1]"), "a list of words"),
    ],
)  # fmt: skip
def test_a_wrong_plan_is_said_in_one_line(tmp_path, text, words):
    with pytest.raises(UserError) as raised:
        read_plan(plan(tmp_path, text))
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_words_that_commands_share_are_spelt_out_once_and_only_whole_words(tmp_path):
    text = '[words]\ngate = ["--steps", "{one}"]\none = "1"\n' + GOOD.replace('"true"', '"run", "{one}", "{gate}", "a{one}"')
    (step,) = read_plan(plan(tmp_path, text))
    assert step.command == ("run", "1", "--steps", "{one}", "a{one}")


def test_words_that_plans_share_are_in_a_file_beside_them_and_a_plan_s_own_come_first(tmp_path):
    (tmp_path / "both.toml").write_text('[words]\none = "1"\ntwo = ["2", "2"]\n', encoding="utf-8")
    text = 'words_of = "both.toml"\n' + GOOD.replace('"true"', '"run", "{one}", "{two}"')
    assert read_plan(plan(tmp_path, text))[0].command == ("run", "1", "2", "2")
    assert read_plan(plan(tmp_path, text + '[words]\none = "own"\n'))[0].command == ("run", "own", "2", "2")


def test_a_plan_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"none\.toml: no such file$"):
        read_plan(tmp_path / "none.toml")


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "sessions").glob("*_*.toml")), ids=lambda path: path.stem)
def test_the_plans_here_name_what_is_there(path):
    known = {"all", *discover(), *(peer.name for peer in PEERS)}
    for one in read_plan(path):
        assert one.command[:2] == ("python", "-m")
        module = ROOT / one.command[2].replace(".", "/")
        assert one.command[2] == "pytest" or module.with_suffix(".py").is_file() or (module / "__main__.py").is_file()
        flags = " ".join(one.command).split(" --")
        lists = [words.split()[1:] for words in flags if words.startswith(("arms ", "optimizations ", "optimization "))]
        assert {name for names in lists for joined in names for name in joined.split(JOIN)} <= known
        if one.command[2] == "bench.run":  # which refuses a second one, minutes into a lease
            assert all(sum(JOIN in joined for joined in names) <= 1 for names in lists)
