"""Host stacks: what of py-spy's lines counts, that no path of a machine stays, the tree, and words where there is none."""

from __future__ import annotations

import os
import re
import stat
import time
from collections import Counter
from pathlib import Path

import pytest

from bench.profile import stacks
from bench.report.flame import flame

STEP = "train_step (loop/training.py)"


@pytest.mark.parametrize(
    ("frame", "clean"),
    [
        ("forward (/home/me/.venv/lib/python3.11/site-packages/torch/nn/modules/linear.py)",
         "forward (torch/nn/modules/linear.py)"),
        ("forward (/usr/lib/python3/dist-packages/torch/_tensor.py)", "forward (torch/_tensor.py)"),
        ("poll (/usr/lib/python3.12/subprocess.py)", "poll (subprocess.py)"),
        (f"train_step ({stacks.ROOT}/loop/training.py)", STEP),
        ("train_step (loop/training.py)", STEP),
        ("main (/home/me/secret project/x.py)", "main (x.py)"),
        ("f (/root/a b/c.py:12)", "f (c.py)"),
        ("helper (torch/_compile.py:53)", "helper (torch/_compile.py)"),
        ("<module> (<string>)", "<module> (<string>)"),
        ("run /home/me/x.py", "run x.py"),
        ("_run_code (<frozen runpy>)", "_run_code (<frozen runpy>)"),
        ("no file", "no file"),
    ],
)  # fmt: skip
def test_paths_are_as_seen_from_their_package(frame, clean):
    assert stacks.cleaned(frame) == clean


def test_stacks_begin_with_the_step_and_other_threads_count_when_they_are_autograds():
    lines = [
        "thread (0x7F): MainThread;<module> (/x/m.py);work (/x/p.py);train_step (loop/training.py);a (torch/a.py) 3",
        "thread (0x7F): MainThread;<module> (/x/m.py);other (/y/p.py);train_step (loop/training.py);a (torch/a.py) 2",
        "thread (0x7F): MainThread;<module> (/x/m.py);poll (subprocess.py) 9",
        "thread (0x8F): Thread-1;Thread._bootstrap (threading.py);run (tqdm/_monitor.py) 99",
        "thread (0x9F);backward (torch/autograd/function.py);mine (kernels/x/kernel.py) 4",
        "", "thread (0xAF): MainThread", "thread (0x7F): MainThread;train_step (loop/training.py) many",
    ]  # fmt: skip
    assert stacks.merged(lines) == {
        (STEP, "a (torch/a.py)"): 5,
        ("another thread", "backward (torch/autograd/function.py)", "mine (kernels/x/kernel.py)"): 4,
    }


def test_a_tree_is_walked_heaviest_first_and_leaves_the_thin_out():
    found = stacks.tree(Counter({("s", "a"): 600, ("s", "b", "c"): 390, ("s",): 9, ("s", "thin"): 1}), 5)
    assert found["samples"] == 1000 and found["frames"] == ["s", "a", "b", "c"]
    assert found["nodes"] == [[0, 0, 1000], [1, 1, 600], [1, 2, 390], [2, 3, 390]]
    assert found["own"] == [["a", 600], ["c", 390], ["s", 9], ["thin", 1]]


def test_a_tree_of_very_many_functions_stays_small_and_so_does_its_drawing():
    many = {tuple(f"function_{number % 7}_{depth} (torch/some/module_{depth}.py)" for depth in range(40 + number % 13)): 9
            for number in range(90)}  # fmt: skip
    for number in range(4000):
        many["root", f"a function with a long name, number {number} (package/of/somebody/file_{number}.py)"] = 1
    found = stacks.tree(Counter(many), 5)
    assert 0 < len(found["nodes"]) <= stacks.MOST_NODES
    assert len(flame(found, "a title")) < 300_000


def test_a_drawing_is_text_that_markup_cannot_break():
    from xml.etree import ElementTree

    odd = '<script>"&" (torch/x.py)'
    found = stacks.tree(Counter({("s", odd): 5, ("s",): 5, ("t",): 10}), 1)
    root = ElementTree.fromstring(flame(found, 'a & b <"c">'))
    titles = [title.text for title in root.iter("{http://www.w3.org/2000/svg}title")]
    assert f"{odd}: 5 samples, 25.0 %" in titles and len(titles) == 3
    boxes = [shape.attrib for shape in root.iter("{http://www.w3.org/2000/svg}rect")][1:]
    assert sorted((float(box["x"]), int(box["y"])) for box in boxes) == [(0.0, 34), (0.0, 51), (600.0, 34)]


def fake_spy(folder: Path, script: str) -> None:
    path = folder / "py-spy"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def spy(tmp_path, monkeypatch):
    """Puts a py-spy of our own in the place of the installed one."""

    def put(script: str) -> None:
        fake_spy(tmp_path, script)
        monkeypatch.setattr(stacks, "_command", lambda: str(tmp_path / "py-spy"))

    return put


def test_without_py_spy_it_says_so(monkeypatch):
    monkeypatch.setattr(stacks.shutil, "which", lambda name, path=None: None)
    assert "not installed" in stacks.sample(lambda: pytest.fail("worked for nobody"), 1)["missing"]
    assert stacks.sample(lambda: pytest.fail("worked for nobody"), 0) == {"missing": "not asked for"}


def test_where_py_spy_is_not_allowed_it_says_so_without_paths(spy):
    spy('echo "py-spy> Sampling process"; echo "Error: Permission Denied at /home/me/secret/x" >&2; exit 1')
    calls = []
    missing = stacks.sample(lambda: calls.append(time.sleep(0.01)), 1)["missing"]
    assert missing == "py-spy could not look at this process: Error: Permission Denied at x"


def test_a_py_spy_that_never_ends_is_ended(spy, monkeypatch):
    monkeypatch.setattr(stacks, "PATIENCE", 0.2)
    spy("exec sleep 100")
    began = time.monotonic()
    assert "ended with code -9" in stacks.sample(lambda: time.sleep(0.01), 0.1)["missing"]
    assert time.monotonic() - began < 20


def test_an_interrupt_leaves_nobody_looking(spy, tmp_path):
    spy(f"echo $$ > {tmp_path}/pid; exec sleep 100")

    def interrupted() -> None:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip():
            raise KeyboardInterrupt
        time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        stacks.sample(interrupted, 30)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def train_step() -> None:
    """Stands where the loop's stood: what it does is seen."""
    sum(range(200_000))


def test_the_real_py_spy_sees_this_process(monkeypatch):
    if stacks._command() is None:
        pytest.skip("py-spy is not installed")
    monkeypatch.setattr(stacks, "FIRST", f"train_step ({Path(__file__).name})")
    found = stacks.sample(train_step, 1)
    if "could not look" in found.get("missing", ""):
        pytest.skip(found["missing"])
    assert found["samples"] > 10 and found["nodes"][0][0] == 0
    assert not [frame for frame in found["frames"] if re.search(r"[\s(]/", frame)]
