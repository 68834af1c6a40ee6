"""Drives one arm: a fresh process with a fresh build, which nothing has to undo."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from abtest import template
from loop.config import Config
from loop.errors import UserError
from loop.recipe import to_plain

ROOT = Path(__file__).resolve().parent.parent
WORKER = ("abtest.worker",)
OUT_OF_MEMORY = "out of memory"  # how an arm says so
OnStep = Callable[[int, int], None]


class ArmFailed(Exception):
    """The arm's process ended, or could not go on. The message is one line; `output` the last lines it printed, `command`
    what it had been asked for."""

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output, self.command = output, ""

    @property
    def of_memory(self) -> bool:
        """Whether device memory was short."""
        return str(self).startswith(OUT_OF_MEMORY)


@dataclass(frozen=True)
class ArmSpec:
    """What an arm is: its name, what it switches on, its configuration.

    `planted` is a case of the catalogue that is planted on top; `exact` makes the arm the oracle. `worker`: the module that
    the arm's process runs, and its arguments.
    """

    name: str
    config: Config
    optimizations: tuple[str, ...] = ()
    planted: str | None = None
    exact: bool = False
    worker: tuple[str, ...] = WORKER


class Arm:
    """A worker process. Use as a context manager; `call` sends a command and returns its answer."""

    running: tuple[str, ...] = WORKER  # what the process runs

    def __init__(self, spec: ArmSpec, log_folder: Path, environment: dict[str, str]) -> None:
        self.spec = spec
        self.folder, self.environment = log_folder, environment
        self.seconds: dict[str, float] = {}  # what every command took, over all calls; arms may share one
        self._start()

    def _start(self) -> None:
        self.running = self.spec.worker
        self.log = self.folder / f"{self.spec.name}.log"
        with self.log.open("wb") as log:
            if self.running == WORKER and template.usable():
                self.process = template.forked(self.environment, log.fileno())
                return
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self.running], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                cwd=ROOT, env=self.environment, text=True, encoding="utf-8",
            )  # fmt: skip

    def __enter__(self) -> Arm:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end(5 if kind is None else 0.1)

    def close(self) -> None:
        """Tells the process that nothing more will be asked, and waits for nothing."""
        with contextlib.suppress(BrokenPipeError):  # the process may have ended with a command still in the pipe
            self.process.stdin.close()

    def end(self, patience: float) -> None:
        """Ends the process, which has `patience` seconds to end by itself."""
        self.close()
        try:
            self.process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def build(self) -> dict[str, Any]:
        """The arm's run, built; `built` keeps the answer. A process that was started ahead, for whichever arm comes next,
        makes way where the arm runs another worker."""
        if self.running != self.spec.worker:
            self.end(0)
            self._start()
        config = to_plain(self.spec.config)
        self.built = self.call(
            "build",
            config=config,
            optimizations=list(self.spec.optimizations),
            planted=self.spec.planted,
            exact=self.spec.exact,
        )
        return self.built

    def call(self, command: str, on_step: OnStep | None = None, **arguments: Any) -> dict[str, Any]:
        """Sends `command` and waits for the answer. Raises ArmFailed, or UserError for a mistake of the user's."""
        began = time.monotonic()
        try:
            return self._ask(command, on_step, arguments)
        except ArmFailed as error:
            error.command = command
            raise
        finally:
            key = f"{self.spec.name}: {command}"
            self.seconds[key] = self.seconds.get(key, 0.0) + time.monotonic() - began

    def _ask(self, command: str, on_step: OnStep | None, arguments: dict[str, Any]) -> dict[str, Any]:
        try:
            print(json.dumps({"command": command, **arguments}), file=self.process.stdin, flush=True)
        except BrokenPipeError as error:
            raise self._ended() from error
        for line in self.process.stdout:
            message = json.loads(line)
            if "answer" in message:
                return message["answer"]
            if "user_error" in message:
                raise UserError(message["user_error"])
            if "failed" in message:
                raise ArmFailed(message["failed"], "\n".join(self._printed()[-30:]))
            if on_step is not None:
                on_step(message["step"], message["steps"])
        raise self._ended()

    def _ended(self) -> ArmFailed:
        code, lines = self.process.wait(), self._printed()
        last = lines[-1] if lines else "no output"
        return ArmFailed(f"the process of arm {self.spec.name} ended with code {code}: {last}", "\n".join(lines[-30:]))

    def _printed(self) -> list[str]:
        return self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
