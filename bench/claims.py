"""Who measures what, where several commands work on one run: an arm belongs to the command that claimed it first.

A claim is a lock on a file beside the records. The system lets go of it when the process ends, however it ends, so nothing
has to be cleaned up before somebody else may take the arm.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO


class Claims:
    """This command's claims in a run. Use as a context manager: what is still claimed at the end is let go.

    folder: of the records. On a file system without locks every claim is granted, and an arm may be measured twice.
    """

    def __init__(self, folder: Path, run_id: str) -> None:
        self.folder, self.run_id = folder, run_id
        self.held: dict[str, BinaryIO] = {}

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for name in list(self.held):
            self.let_go(name)

    def _path(self, name: str) -> Path:
        return self.folder / f".{self.run_id}-{name}.lock"

    def take(self, name: str) -> bool:
        """Whether the arm is this command's now, or was already; False where another command has it, or had it just now."""
        if name in self.held:
            return True
        file = self._path(name).open("ab")
        if self._locked(file, self._path(name)):
            self.held[name] = file
            return True
        file.close()
        return False

    def _locked(self, file: BinaryIO, path: Path) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return True
        # Whoever let go between opening and locking has removed the file, and somebody else may hold a newer one.
        return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())

    def let_go(self, name: str) -> None:
        """The file goes first, while it is locked, so that nobody removes a file that another command holds."""
        self._path(name).unlink(missing_ok=True)
        self.held.pop(name).close()


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Waits until no other command is in such a block; on a file system without locks it does not wait."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
