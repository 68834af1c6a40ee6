"""`python -m bench.session PLAN.toml`: many commands on the GPUs of a box that is there for a while.

The commands of one GPU run one after another, those of several GPUs side by side, each on an equal share of the processor
cores: a compiler that takes every core would slow down what is timed beside it. What takes longer than it may is
interrupted, as by Ctrl-C, so that it keeps what it has; one command's failure does not stop the next. The last line on
stdout is one JSON document with how every command ended; each one's output is in a file of its own. Words that several
commands of a plan share stand in its table [words], and in a command as `{name}`; words that several plans share stand in a
file beside them, which `words_of` names.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from loop.cli import guarded, parse
from loop.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}")
SHARED = re.compile(r"\{([A-Za-z0-9._-]+)\}")
PATIENCE = 20.0  # seconds from the interrupt to the end of a command that does not heed it
KEYS = {"name": str, "gpu": int, "command": list, "minutes": (int, float)}


@dataclass(frozen=True)
class Command:
    """Flags of `python -m bench.session`."""

    plan: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PLAN.toml")]  # see bench/sessions/
    minutes: float | None = None  # interrupt what still runs after so many; None: as long as the plan takes
    logs: Path = field(default_factory=lambda: Path("runs") / f"session-{time.strftime('%Y%m%dT%H%M%S')}")


@dataclass(frozen=True)
class Step:
    """A command: which GPU it sees, and the minutes after which it is interrupted."""

    name: str
    gpu: int
    command: tuple[str, ...]
    minutes: float


@dataclass(frozen=True)
class Ended:
    """code: of the process, None if it was not begun. cut: whether its time, or the session's, was over."""

    name: str
    gpu: int
    code: int | None
    seconds: float
    cut: bool

    def __str__(self) -> str:
        if self.code is None:
            return f"{self.name}: not begun, the session's time is over"
        return f"{self.name}: {'interrupted' if self.cut else f'ended with {self.code}'} after {self.seconds:.0f} s"


def read_plan(path: Path) -> list[Step]:
    """The steps of a plan, in order. Raises UserError naming what is wrong with it."""
    tables = _read(path)
    steps, words, others = tables.pop("step", None), tables.pop("words", {}), tables.pop("words_of", None)
    if tables or not isinstance(steps, list) or not steps:
        raise UserError(f"{path}: tables [[step]] are expected, perhaps [words] and words_of, and nothing else")
    words = _shared(path, words)
    if others is not None:
        if not isinstance(others, str) or not NAME.fullmatch(others):
            raise UserError(f"{path}: words_of {others!r:.60}: the name of a file beside the plan is expected")
        words = _shared(path.with_name(others), _read(path.with_name(others)).get("words")) | words
    found = [_step(values, words, f"{path}: step {index + 1}") for index, values in enumerate(steps)]
    twice = {step.name for step in found if sum(other.name == step.name for other in found) > 1}
    if twice:
        raise UserError(f"{path}: two steps are called {min(twice)}")
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {'no such file' if isinstance(error, FileNotFoundError) else error}") from error


def _shared(path: Path, words: Any) -> dict[str, Any]:
    """What [words] of a file has, if it is that."""
    if not isinstance(words, dict) or not all(_are_words(given) for given in words.values()):
        raise UserError(f"{path}: [words]: a word, or a list of words, is expected for each name")
    return words


def _are_words(given: Any) -> bool:
    return isinstance(given, str) or (isinstance(given, list) and all(isinstance(word, str) for word in given))


def _step(values: Any, shared: dict[str, Any], where: str) -> Step:
    if not isinstance(values, dict) or set(values) != set(KEYS):
        raise UserError(f"{where}: the keys {', '.join(KEYS)} are expected")
    for key, kind in KEYS.items():
        if not isinstance(values[key], kind) or isinstance(values[key], bool):
            raise UserError(f"{where}: {key} is {values[key]!r:.60}")
    command = values["command"]
    if not NAME.fullmatch(values["name"]):
        raise UserError(f"{where}: name {values['name']!r:.60}: letters, digits, '.', '_' and '-' are expected, at most 61")
    command = [word for given in command for word in _spelt_out(given, shared, where)] if _are_words(command) else []
    if not command:
        raise UserError(f"{where}: command must be a list of words")
    if values["gpu"] < 0 or not 0 < values["minutes"] < math.inf:
        raise UserError(f"{where}: gpu must be at least 0, and minutes above 0")
    return Step(values["name"], values["gpu"], tuple(command), float(values["minutes"]))


def _spelt_out(word: str, shared: dict[str, Any], where: str) -> list[str]:
    """The word itself, or what `{name}` stands for."""
    name = SHARED.fullmatch(word)
    if name is None:
        return [word]
    if name[1] not in shared:
        raise UserError(f"{where}: {word}: [words] has no {name[1]}")
    given = shared[name[1]]
    return [given] if isinstance(given, str) else given


def shares(lanes: int) -> list[set[int]]:
    """The cores of each of so many lanes: neighbours, disjoint, equally many. Empty sets, which leave all cores to all,
    where there are fewer cores than lanes or the system has no such thing."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    each = len(cores) // lanes
    return [set(cores[lane * each : (lane + 1) * each]) for lane in range(lanes)]


class Session:
    """Runs steps. end: a reading of time.monotonic() by which all are to have ended. logs: a folder, made here."""

    def __init__(self, steps: list[Step], logs: Path, end: float = math.inf) -> None:
        self.steps, self.logs, self.end = steps, logs, end
        self.stopped = threading.Event()
        logs.mkdir(parents=True, exist_ok=True)

    def run(self) -> list[Ended]:
        """How every step ended, in the plan's order. Ctrl-C interrupts those at work, and begins no other."""
        by_gpu: dict[int, list[Step]] = {}
        for step in self.steps:
            by_gpu.setdefault(step.gpu, []).append(step)
        with ThreadPoolExecutor(len(by_gpu)) as pool:
            lanes = [pool.submit(self._lane, *lane) for lane in zip(by_gpu.values(), shares(len(by_gpu)), strict=True)]
            try:
                ended = {one.name: one for lane in lanes for one in lane.result()}
            finally:  # else the pool would wait for lanes that nobody has told
                self.stopped.set()
        return [ended[step.name] for step in self.steps]

    def _lane(self, steps: list[Step], cores: set[int]) -> list[Ended]:
        if cores:
            os.sched_setaffinity(0, cores)  # of this thread alone; what it starts inherits it
        ended = []
        for step in steps:
            ended.append(self._step(step))
            print(f"{time.strftime('%H:%M:%S')} gpu {step.gpu}, {ended[-1]}", file=sys.stderr, flush=True)
        return ended

    def _step(self, step: Step) -> Ended:
        began = time.monotonic()
        end = min(began + 60 * step.minutes, self.end)
        if began >= self.end or self.stopped.is_set():
            return Ended(step.name, step.gpu, None, 0.0, cut=True)
        words = [sys.executable, *step.command[1:]] if step.command[0] == "python" else list(step.command)
        environment = dict(os.environ) | {"CUDA_VISIBLE_DEVICES": str(step.gpu), "PYTHONUNBUFFERED": "1"}
        with (self.logs / f"{step.name}.log").open("wb") as log:
            try:
                process = subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment,
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                log.write(f"{error}\n".encode())
                return Ended(step.name, step.gpu, 127, 0.0, cut=False)
            cut = self._wait(process, end)
        return Ended(step.name, step.gpu, process.returncode, time.monotonic() - began, cut)

    def _wait(self, process: subprocess.Popen, end: float) -> bool:
        """Until the process has ended; whether it had to be told to."""
        while process.poll() is None and time.monotonic() < end and not self.stopped.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=min(0.5, max(end - time.monotonic(), 0.01)))
        if process.poll() is not None:
            return False
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=PATIENCE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # whatever of it does not heed an interrupt, children included
        process.wait()
        return True


def main(argv: list[str] | None = None) -> int:
    began = time.monotonic()
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = parse(Command(Path("PLAN.toml")), "python -m bench.session", "Runs a plan of commands.", arguments)
    if command.minutes is not None and not command.minutes > 0:
        raise UserError(f"--minutes is {command.minutes}; it must be above 0")
    steps = read_plan(command.plan)
    end = math.inf if command.minutes is None else began + 60 * command.minutes
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell's `&` has this process ignore interrupts, and its commands would inherit that and be killed instead. What
        # is handled, though by nothing, has its default again in them.
        signal.signal(signal.SIGINT, lambda number, frame: None)
    print(f"output is in {command.logs}", file=sys.stderr)
    ended = Session(steps, command.logs, end).run()
    print(json.dumps([vars(one) for one in ended]))
    return int(any(one.code != 0 for one in ended))


if __name__ == "__main__":
    guarded(main)
