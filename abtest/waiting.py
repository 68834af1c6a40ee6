"""Arms that are started long before their turn, for what takes minutes and needs neither a GPU nor anybody's answer."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass

from abtest.arm import Arm, ArmFailed, ArmSpec
from loop.errors import UserError
from loop.recipe import to_plain

PATIENCE = 5.0  # seconds from the interrupt to the end


@dataclass
class _Begun:
    arm: Arm
    thread: threading.Thread
    failed: bool = False


class Waiting:
    """The processes of arms that wait for their turn; each is asked to get ready when it starts."""

    def __init__(self) -> None:
        self.begun: dict[ArmSpec, _Begun] = {}

    def begin(self, spec: ArmSpec, start: Callable[[ArmSpec], Arm]) -> None:
        """start(spec): the arm's process. Returns at once."""

        def get_ready() -> None:
            try:
                arm.call("ahead", config=to_plain(spec.config))
            except (ArmFailed, UserError):
                one.failed = True  # its next process will fail as well, in its turn, and say why

        arm = start(spec)
        one = self.begun[spec] = _Begun(arm, threading.Thread(target=get_ready, daemon=True))
        one.thread.start()

    def take(self, spec: ArmSpec) -> Arm | None:
        """The arm's process, as soon as it is ready; None if none was started, or if it failed."""
        one = self.begun.pop(spec, None)
        if one is None:
            return None
        one.thread.join()
        if one.failed:
            one.arm.end(0)
            return None
        return one.arm

    def quiet(self) -> None:
        """Waits until nobody is at work here: nothing else should be when something is timed."""
        for one in list(self.begun.values()):
            one.thread.join()

    def end(self) -> None:
        """Ends those whose turn never came, in the middle of their work if need be."""
        for one in self.begun.values():
            one.arm.close()
            if one.thread.is_alive() and one.arm.process.poll() is None:
                os.kill(one.arm.process.pid, signal.SIGINT)  # what it has begun and written ends with it
        for one in self.begun.values():
            try:
                one.arm.process.wait(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                one.arm.process.kill()
            one.thread.join()  # it reads what `end` closes
            one.arm.end(0)
        self.begun.clear()
