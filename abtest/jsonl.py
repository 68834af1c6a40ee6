"""JSON lines: what every file of records shares. Strict when it reads, and safe when a process dies while it writes.

Non-finite numbers are written as strings ("nan", "inf"), since JSON has none, and are numbers again where a number belongs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from abtest.verdict import PARTS, Check, Level, Verdict
from loop.errors import UserError

T = TypeVar("T")
JSON_NAMES = {dict: "an object", list: "an array", str: "a string", bool: "true or false"}
DAMAGE = (ValueError, TypeError, KeyError, OverflowError, RecursionError)  # what a line that is no valid record raises


def dumps(value: Any) -> str:
    """One line, keys sorted. `value` may hold dataclasses, tuples, levels and paths."""
    return json.dumps(plain(value), sort_keys=True, ensure_ascii=False, allow_nan=False)


def plain(value: Any) -> Any:
    """`value` as JSON values. A check's part and state are left out where it has none, as in records that are older."""
    if isinstance(value, Check):
        fields = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        return {name: plain(item) for name, item in fields.items() if item or name not in ("part", "state")}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Level):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def moment(text: str) -> datetime:
    """An ISO 8601 time; one without a zone is UTC. Raises ValueError for anything else."""
    found = datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def append(path: Path, line: str) -> None:
    """Adds one line in a single write and flushes it to disk, so a crash loses at most the line in flight. Commands that
    append to the same file at the same time wait for each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = line.encode("utf-8") + b"\n"
    with path.open("ab") as file:
        _lock(file, fcntl.LOCK_EX)  # until it is closed
        before = path.read_bytes()
        if before and not before.endswith(b"\n"):
            data = b"\n" + data  # a torn last line stays one bad line and does not swallow this one
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _lock(file: BinaryIO, kind: int) -> None:
    """Waits for the lock. On a file system without locks there is none; a single write is one line there, too."""
    with contextlib.suppress(OSError):
        fcntl.flock(file, kind)


def _whole(path: Path) -> bytes:
    """The file, without half of a line that somebody is appending."""
    with path.open("rb") as file:
        _lock(file, fcntl.LOCK_SH)
        return file.read()


def read(path: Path, parse: Callable[[str], T]) -> list[T]:
    """Every line of a file through `parse`, in order. Raises UserError naming file and line for one that is not valid."""
    found = []
    for number, line in enumerate(_whole(path).split(b"\n"), 1):  # str.splitlines would also split inside strings
        if not line.strip():
            continue
        try:
            found.append(parse(line.decode("utf-8")))
        except DAMAGE as error:
            why = f"no key {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{path}:{number}: not a valid record: {why}") from error
    return found


def expect(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{what} is {value!r:.60}, not {JSON_NAMES[kind]}")
    return value


def keys(fields: dict[str, Any], required: Sequence[str], what: str, optional: Sequence[str] = ()) -> dict[str, Any]:
    """`fields` itself. Raises KeyError for a key that it lacks, ValueError for one that nobody knows."""
    for name in required:
        if name not in fields:
            raise KeyError(name)
    unknown = [name for name in fields if name not in required and name not in optional]
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r:.60} in {what}")
    return fields


def one_of(value: Any, known: Sequence[str], what: str) -> str:
    if value not in known:
        raise ValueError(f"{what} is {value!r:.60}, not one of {', '.join(known)}")
    return value


def strings(value: Any, what: str) -> tuple[str, ...]:
    return tuple(expect(item, str, f"one of {what}") for item in expect(value, list, what))


def whole(value: Any, what: str) -> int:
    if type(value) is not int:
        raise ValueError(f"{what} is {value!r:.60}, not a whole number")
    return value


def number(value: Any, what: str) -> float:
    """A float, from a number or from the string that stands for a non-finite one."""
    if type(value) not in (int, float, str):
        raise ValueError(f"{what} is {value!r:.60}, not a number")
    return float(value)  # an integer beyond what a float holds raises OverflowError here


def series(value: Any, what: str) -> tuple[float, ...]:
    return tuple(number(item, f"one of {what}") for item in expect(value, list, what))


def numbers(fields: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The strings that stand for non-finite numbers become numbers again; integers stay integers."""
    fields = {key: float(value) if key in names and isinstance(value, str) else value for key, value in fields.items()}
    for key in names:
        if fields.get(key) is not None and type(fields[key]) not in (int, float):
            raise ValueError(f"{key} is {fields[key]!r:.60}, not a number")
        float(fields.get(key) or 0)
    return fields


def verdict(value: Any) -> Verdict:
    """A verdict with its checks. Raises as `read` expects."""
    fields = expect(value, dict, "verdict")
    checks = tuple(_check(check) for check in expect(fields["checks"], list, "checks"))
    return Verdict(Level(fields["level"]), expect(fields["reason"], str, "reason"), checks)


def _check(value: Any) -> Check:
    check = Check(**numbers(expect(value, dict, "a check"), ("value", "limit")))
    for name, kind in (("name", str), ("passed", bool), ("detail", str), ("state", str)):
        expect(getattr(check, name), kind, f"a check's {name}")
    if whole(check.part, "a check's part") not in PARTS:
        raise ValueError(f"a check's part is {check.part}, not one of {', '.join(map(str, PARTS))}")
    return check
