"""From record files to one `Device` each: which record of an arm counts, and which are history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bench import records
from bench.records import Record
from loop.errors import UserError

NO_DEVICES = ("cross_compile", "gate")  # folders of records that are of no one device's runs


@dataclass(frozen=True)
class Device:
    """All that is known of one device.

    current: the newest record of each arm in the newest run; only these are compared with each other and only they ship.
    earlier: arms that the newest run lacks, the newest record of each. older: how many records of an arm neither holds.
    """

    slug: str
    current: tuple[Record, ...]
    earlier: tuple[Record, ...]
    older: dict[str, int]

    @property
    def name(self) -> str:
        return str(self.current[0].environment.get("device") or self.slug)

    @property
    def run_id(self) -> str:
        return self.current[0].run_id

    @property
    def reference(self) -> Record | None:
        return next((record for record in self.current if record.role == "reference"), None)


def load(data_dir: Path) -> list[Device]:
    """Every device that has a record in `data_dir`/<device_slug>/*.jsonl, ordered by slug. `NO_DEVICES` are none.

    Raises UserError for a folder that is not there, a line that is no valid record, and a record of another device.
    """
    if not data_dir.is_dir():
        raise UserError(f"{data_dir}: no such folder of records; `python -m bench.run` makes it")
    devices = []
    for folder in sorted(path for path in data_dir.iterdir() if path.is_dir() and path.name not in NO_DEVICES):
        found = [record for path in sorted(folder.glob("*.jsonl")) for record in _read(path, folder.name)]
        if found:
            devices.append(select(folder.name, found))
    return devices


def _read(path: Path, slug: str) -> list[Record]:
    found = records.read(path)
    for record in found:
        where = f"{path}: record of arm {record.arm!r} in run {record.run_id!r}"
        named = record.environment.get("device_slug", slug)
        if named != slug:
            raise UserError(f"{where} is of device {named!r}, which belongs in the folder {named!r}, not {slug!r}")
        try:
            finished(record)
        except ValueError as error:
            raise UserError(f"{where}: finished_at {record.finished_at!r} is not an ISO 8601 time") from error
    return found


def select(slug: str, found: Sequence[Record]) -> Device:
    """Splits one device's records, oldest file line first, into the newest run, arms of earlier runs, and the rest."""
    ordered = sorted(found, key=finished)  # stable: of two records of one second, the later line is the newer
    run_id = ordered[-1].run_id
    current = newest_by_arm(record for record in ordered if record.run_id == run_id)
    earlier = {arm: record for arm, record in newest_by_arm(ordered).items() if arm not in current}
    counts = {arm: sum(record.arm == arm for record in ordered) - 1 for arm in (*current, *earlier)}
    older = {arm: count for arm, count in counts.items() if count}
    return Device(slug, tuple(current.values()), tuple(earlier.values()), older)


def newest_by_arm(ordered) -> dict[str, Record]:
    """The last record of each arm, in the order in which the arms first appear."""
    return {record.arm: record for record in ordered}


def finished(record: Record) -> datetime:
    """When the arm finished; a time without a zone is UTC. Raises ValueError for what is no ISO 8601 time."""
    moment = datetime.fromisoformat(record.finished_at)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
