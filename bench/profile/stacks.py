"""Host stacks by py-spy, a child process that looks at this one while it works; no path of this machine stays in them.

A flame graph is drawn from what `sample` returns, and so from a record, as everything else in the reports is.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RATE = 100  # samples a second
PATIENCE = 60  # seconds beyond its time after which py-spy is ended
MOST_NODES = 700  # of the tree that a record keeps; a drawing of them stays well below 300 KB
LEAST_SHARE = 0.003  # of all samples, below which a node is left out
OWN = 12  # functions by samples of their own
FIRST = "train_step (loop/training.py)"  # what is around it is the same in all samples
MAIN = "MainThread"
PR_SET_PTRACER, ANY, NOBODY = 0x59616D61, -1, 0  # prctl's; Linux may let a process be looked at by its ancestors alone
PACKAGES = re.compile(r"^.*/(?:site-packages|dist-packages|lib/python\d+\.\d+)/")


@dataclass
class Node:
    """A function in one place of the tree: samples in which it was there, and what it called."""

    samples: int = 0
    calls: dict[str, Node] = field(default_factory=dict)


def sample(work: Callable[[], object], seconds: float) -> dict[str, Any]:
    """Calls `work` over and over for `seconds` while py-spy samples, and returns the merged stacks as JSON values, or under
    "missing" why there are none, in words."""
    if not seconds:
        return {"missing": "not asked for"}
    command = _command()
    if command is None:
        return {"missing": "py-spy is not installed (`pip install py-spy`)"}
    with tempfile.TemporaryDirectory(prefix="isoloss-") as folder:
        raw = Path(folder) / "stacks.txt"
        code, said = _record(command, raw, work, seconds)
        if code != 0 or not raw.is_file():
            why = _one_line(said) or f"it ended with code {code}"
            return {"missing": f"py-spy could not look at this process: {why}"}
        lines = raw.read_text(encoding="utf-8", errors="replace").splitlines()
    stacks = merged(lines)
    return tree(stacks, seconds) if stacks else {"missing": "py-spy saw no step in that time"}


def _command() -> str | None:
    """py-spy of this interpreter's environment, else the one on the path."""
    return shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")


def _record(command: str, raw: Path, work: Callable[[], object], seconds: float) -> tuple[int, str]:
    """py-spy's exit code and what it said; `work` is called until it ends. It never outlives this call."""
    arguments = [
        command, "record", "--pid", str(os.getpid()), "--format", "raw", "--output", str(raw), "--rate", str(RATE),
        "--duration", str(max(1, round(seconds))), "--nolineno", "--threads", "--idle",
    ]  # fmt: skip
    log = raw.with_suffix(".log")
    with _visible(), log.open("wb") as output, _ended(subprocess.Popen(arguments, stdout=output, stderr=output)) as process:
        deadline = time.monotonic() + seconds + PATIENCE
        while process.poll() is None and time.monotonic() < deadline:
            work()
    return process.wait(), log.read_text(encoding="utf-8", errors="replace")


@contextlib.contextmanager
def _ended(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """Ends the process at the end, however that comes: an interrupt leaves no one looking."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@contextlib.contextmanager
def _visible() -> Iterator[None]:
    """Lets a child look at this process where Yama lets ancestors alone. Elsewhere the call fails, and nothing changes."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PTRACER, ctypes.c_long(ANY), 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(PR_SET_PTRACER, ctypes.c_long(NOBODY), 0, 0, 0)


def _one_line(said: str) -> str:
    """The last lines that are a reason, without py-spy's hints and colours."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in said.splitlines()]
    lines = [line for line in lines if line and not line.startswith("py-spy>")]
    return _pathless(" ".join(lines)[:200])


def merged(lines: Iterable[str]) -> Counter[tuple[str, ...]]:
    """Stacks of a step with how often they were seen, outermost function first, from py-spy's raw lines: frames between
    semicolons, then a count. The main thread's begin with the step. Of others those count that have no `threading` at their
    root: a thread of autograd's, when backward calls Python."""
    found: Counter[tuple[str, ...]] = Counter()
    for line in lines:
        words, _, count = line.rpartition(" ")
        thread, *frames = words.split(";")
        frames = [cleaned(frame) for frame in frames]
        if thread.endswith(MAIN):
            frames = frames[frames.index(FIRST) :] if FIRST in frames else []
        elif any("(threading.py)" in frame for frame in frames[:2]):
            frames = []
        else:
            frames = ["another thread", *frames] if frames else []
        if frames and count.isdigit():
            found[tuple(frames)] += int(count)
    return found


def cleaned(frame: str) -> str:
    """A frame, "forward (/home/me/venv/lib/python3.11/site-packages/torch/nn/linear.py)", with its file as seen from its
    package, "forward (torch/nn/linear.py)"."""
    name, bracket, file = frame.rpartition(" (")
    return f"{_pathless(name)} ({_short(file.removesuffix(')'))})" if bracket else _pathless(frame)


def _short(file: str) -> str:
    file = re.sub(r":\d+$", "", file)
    if file.startswith(f"{ROOT}/"):
        return file[len(str(ROOT)) + 1 :]
    inside = PACKAGES.sub("", file)
    return inside.rpartition("/")[2] if inside.startswith("/") else inside


def _pathless(text: str) -> str:
    """Text in which of every absolute path only the last part is left."""
    return re.sub(r"(?<![\w.])(?:/[^\s/;:'\"()]+)+/", "", text)


def tree(stacks: Counter[tuple[str, ...]], seconds: float) -> dict[str, Any]:
    """Merged stacks as JSON values: `frames`, every name once; `nodes`, [depth, frame, samples] in the order of a walk from
    the outermost; `own`, the functions with most samples in them and in nothing that they call. What is thin is left out."""
    root, own = Node(), Counter()
    for stack, count in stacks.items():
        at = root
        at.samples += count
        own[stack[-1]] += count
        for frame in stack:
            at = at.calls.setdefault(frame, Node())
            at.samples += count
    least = max(1.0, LEAST_SHARE * root.samples)
    while len(nodes := list(_walk(root, least))) > MOST_NODES:
        least *= 1.3
    names = {frame: place for place, frame in enumerate(dict.fromkeys(frame for _, frame, _ in nodes))}
    return {
        "samples": root.samples, "rate_hz": RATE, "seconds": seconds, "frames": list(names),
        "nodes": [[depth, names[frame], samples] for depth, frame, samples in nodes],
        "own": [[frame, samples] for frame, samples in own.most_common(OWN)],
    }  # fmt: skip


def _walk(node: Node, least: float, depth: int = 0) -> Iterator[tuple[int, str, int]]:
    """(depth, frame, samples) of everything below `node` with at least so many samples, heaviest first."""
    for frame, call in sorted(node.calls.items(), key=lambda item: (-item[1].samples, item[0])):
        if call.samples >= least:
            yield depth, frame, call.samples
            yield from _walk(call, least, depth + 1)
