"""A process that has imported what every arm imports, and becomes an arm's by forking: the rest of a small arm's start.

What an arm builds, trains and draws comes after the fork, so arms share nothing but modules. A GPU's driver can't be forked
once it was asked for anything: a template that finds, after its imports, that one of them asked, starts arms from nothing
instead. A template ends with the process that started it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
MODULE = "abtest.template"
MESSAGE = 1 << 20  # bytes of a request, at most: an environment
WORKER = "abtest.worker"  # what an arm's process runs
# Variables that no import reads: CUDA reads its own when it is first used, which is after the fork.
ANOTHER_EACH_TIME = {
    "PYTEST_CURRENT_TEST", "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY", "CUDA_MPS_CLIENT_PRIORITY",
}  # fmt: skip
# PyTorch then asks NVML whether there is a GPU, and not the driver.
OF_TEMPLATES = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
_one_at_a_time = threading.Lock()
_templates: dict[tuple, socket.socket] = {}  # where each takes requests, by its interpreter and environment


class Forked:
    """As much of `subprocess.Popen` as an arm needs, of a process that the template forks as soon as it has imported."""

    def __init__(self, status: socket.socket, stdin: int, stdout: int) -> None:
        self._status, self._pid, self.returncode = status, None, None
        self.stdin = os.fdopen(stdin, "w", encoding="utf-8")
        self.stdout = os.fdopen(stdout, encoding="utf-8")

    @property
    def pid(self) -> int:
        while self._pid is None and self._told(None):
            pass
        return self._pid

    def poll(self) -> int | None:
        while self.returncode is None and self._told(0):
            pass
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        while self.returncode is None:
            if not self._told(timeout):
                raise subprocess.TimeoutExpired(MODULE, timeout)
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None and self.pid is not None and self.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself, and the template has not said so yet
                os.kill(self.pid, signal.SIGKILL)

    def _told(self, timeout: float | None) -> bool:
        """Takes what the template says next, if it says it within `timeout` seconds: first the pid, then the status. One
        that says nothing any more has been killed, and what it forked finds nobody to answer."""
        if not select.select([self._status], [], [], timeout)[0]:
            return False
        told = self._status.recv(64)
        if self._pid is None and told:
            self._pid = int(told)
        else:
            self.returncode = int(told or -signal.SIGKILL)
            self._status.close()
        return True


@cache
def usable() -> bool:
    """Whether this system has what a template needs; some sandboxes lack it. ISOLOSS_FORK=0 says that it has not."""
    if os.environ.get("ISOLOSS_FORK") == "0":
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            socket.send_fds(ours, [b"1"], [0])
            os.close(socket.recv_fds(theirs, 1, 1)[1][0])
    except (AttributeError, OSError, IndexError):
        return False
    return True


def forked(environment: Mapping[str, str], log: int) -> Forked:
    """A process that runs `abtest.worker` in `environment`, its stderr in the file `log`. Waits for nothing."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    read, stdin = os.pipe()
    stdout, write = os.pipe()
    request, given = json.dumps(dict(environment)).encode(), [theirs.fileno(), read, write, log]
    key = _key(environment)
    with _one_at_a_time:
        try:
            if key not in _templates:
                _templates[key] = _start(environment, log)
            socket.send_fds(_templates[key], [request], given)
        except (BrokenPipeError, ConnectionResetError):  # somebody ended it
            _templates[key] = _start(environment, log)
            socket.send_fds(_templates[key], [request], given)
    theirs.close()
    os.close(read)
    os.close(write)
    return Forked(ours, stdin, stdout)


def ahead(environment: Mapping[str, str]) -> None:
    """Starts the template of arms in `environment`, which imports while whoever asks does something else."""
    if usable():
        with _one_at_a_time:
            if _key(environment) not in _templates:
                _templates[_key(environment)] = _start(environment, subprocess.DEVNULL)


def _key(environment: Mapping[str, str]) -> tuple:
    return (sys.executable, *sorted(item for item in environment.items() if item[0] not in ANOTHER_EACH_TIME))


def _start(environment: Mapping[str, str], log: int) -> socket.socket:
    """Where a new template takes requests; what it says while it imports is in the file `log`."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", MODULE], stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=log, cwd=ROOT,
            env=OF_TEMPLATES | dict(environment),
        )  # fmt: skip
    atexit.register(process.kill)  # it may still be importing, for nobody
    return ours


# The template's own process


class _Children:
    """Those that it forked: who is told of each one's end, by a descriptor that becomes readable then."""

    def __init__(self) -> None:
        self.told: dict[int, tuple[int, socket.socket]] = {}

    def add(self, pid: int, status: socket.socket) -> None:
        status.send(str(pid).encode())
        self.told[os.pidfd_open(pid)] = (pid, status)

    def ended(self, descriptor: int) -> None:
        pid, status = self.told.pop(descriptor)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(descriptor)
        with status, contextlib.suppress(BrokenPipeError):  # nobody may want to know any more
            status.send(str(code).encode())

    def forget(self) -> None:
        """In a child, which has nothing to do with the others."""
        for descriptor, (_, status) in self.told.items():
            os.close(descriptor)
            status.close()


def serve(control: socket.socket) -> dict[str, Any] | None:
    """Forks for every request. Returns in each child, with its environment; in the template itself None, when whoever
    started it has ended."""
    children = _Children()
    while True:
        ready = select.select([control, *children.told], [], [])[0]
        for descriptor in ready:
            if descriptor is not control:
                children.ended(descriptor)
        if control not in ready:
            continue
        message, descriptors, _, _ = socket.recv_fds(control, MESSAGE, 4)
        if not message:
            return None
        status, *given = descriptors
        status = socket.socket(fileno=status)
        pid = os.fork()
        if pid == 0:
            children.forget()
            status.close()
            for own, descriptor in enumerate(given):
                os.dup2(descriptor, own)
                os.close(descriptor)
            return json.loads(message)
        children.add(pid, status)
        for descriptor in given:
            os.close(descriptor)


def main() -> None:
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for those who work
    from abtest import worker  # late: it is what takes its time

    control = socket.socket(fileno=os.dup(0))
    worker.import_ahead()
    environment = serve(control)
    if environment is None:
        return
    control.close()
    signal.signal(signal.SIGINT, interrupt)
    if torch.cuda._is_in_bad_fork():  # an import of the template's asked CUDA's driver, which is of no use here then
        os.execve(sys.executable, [sys.executable, "-m", WORKER], environment)
    os.environ.clear()
    os.environ.update(environment)
    worker.main()
    sys.stdout.flush()
    sys.stderr.flush()
    if not torch.cuda.is_initialized():
        os._exit(0)  # taking everything down would first copy all of the template's memory


if __name__ == "__main__":
    main()
