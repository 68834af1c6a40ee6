"""Files of records with one line a measurement and one file a device, reports/data/<kind>/<device_slug>.jsonl."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from abtest import jsonl
from abtest.jsonl import expect


class OfDevice(Protocol):
    """A record; its environment holds `device_slug`."""

    @property
    def environment(self) -> dict[str, Any]: ...


R = TypeVar("R", bound=OfDevice)


def read(path: Path, from_json: Callable[[str], R]) -> list[R]:
    """Every record of a file, in order. from_json raises one of `abtest.jsonl.DAMAGE` for a line that is none. Raises
    UserError naming file and line for one that is not valid, or of a device that is not the file's."""

    def parse(line: str) -> R:
        record = from_json(line)
        slug = expect(record.environment["device_slug"], str, "device_slug")
        if slug != path.stem:
            raise ValueError(f"it is of device {slug!r:.60}, which belongs in {slug:.60}.jsonl")
        return record

    return jsonl.read(path, parse)


def load(folder: Path, read: Callable[[Path], list[R]]) -> dict[str, list[R]]:
    """By device slug, every record in `folder`, in order; devices without any are left out."""
    found = {path.stem: read(path) for path in sorted(folder.glob("*.jsonl"))}
    return {slug: records for slug, records in found.items() if records}
