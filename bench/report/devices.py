"""From record files to one `Device` each: which record of an arm counts, and which are history."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from abtest import jsonl
from bench import micro_records, records
from bench.micro_records import MicroRecord
from bench.records import Record
from bench.report.settings import BASELINES, Trained, folder_names, reference_of, trained
from loop.errors import UserError

NO_DEVICES = ("cross_compile", "gate", "micro", "profile", "search")  # folders of records that are of no one device's runs


@dataclass(frozen=True)
class Setting:
    """All that is known of one setting on one device.

    run: every record of the newest run, oldest first. current: the newest of each arm in it; only these are compared with
    each other and only they ship. earlier: arms that the newest run lacks, the newest record of each. older: how many other
    records an arm has, without stock's of the newest run, which are all shown.
    """

    trained: Trained
    folder: str
    run: tuple[Record, ...]
    current: tuple[Record, ...]
    earlier: tuple[Record, ...]
    older: dict[str, int]

    @property
    def run_id(self) -> str:
        return self.run[0].run_id

    @property
    def newest(self) -> Record:
        return self.run[-1]

    @property
    def reference(self) -> Record | None:
        return next((record for record in self.current if record.role == "reference"), None)

    @property
    def baselines(self) -> tuple[Record, ...]:
        """The reference and its repeats, of every command."""
        return tuple(record for record in self.run if record.role in BASELINES)

    @property
    def commands(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(record.command for record in self.run))

    def stock_of(self, record: Record) -> Record | None:
        """The reference that an arm was measured beside, None for an arm of an earlier run."""
        return reference_of(record, self.run) if record.run_id == self.run_id else None


@dataclass(frozen=True)
class Device:
    """One device: its folder's name, and a `Setting` for each thing that was trained on it."""

    slug: str
    settings: tuple[Setting, ...]

    @property
    def name(self) -> str:
        newest = max((setting.newest for setting in self.settings), key=finished)
        return str(newest.environment.get("device") or self.slug)

    def path(self, setting: Setting) -> str:
        """The folder of a setting's pages under the device's: "" where it is the only one, whose page is the device's."""
        return setting.folder if len(self.settings) > 1 else ""


def load(data_dir: Path) -> list[Device]:
    """Every device that has a record in `data_dir`/<device_slug>/*.jsonl, ordered by slug. `NO_DEVICES` are none. An
    arm that was run without its microbenchmark has the newest that is kept of its own.

    Raises UserError for a folder that is not there, a line that is no valid record, and a record of another device.
    """
    if not data_dir.is_dir():
        raise UserError(f"{data_dir}: no such folder of records; `python -m bench.run` makes it")
    devices, micro = [], micro_records.load(data_dir)
    for folder in sorted(path for path in data_dir.iterdir() if path.is_dir() and path.name not in NO_DEVICES):
        found = [record for path in sorted(folder.glob("*.jsonl")) for record in _read(path, folder.name)]
        if found:
            alone = {one.optimization: one for one in sorted(micro.get(folder.name, []), key=lambda one: one.finished)}
            devices.append(select(folder.name, [_with_micro(record, alone) for record in found]))
    return devices


def _with_micro(record: Record, alone: Mapping[str, MicroRecord]) -> Record:
    """The record of one optimization with its op's newest microbenchmark, if the run itself made none."""
    if record.micro is not None or record.optimizations != (record.arm,) or record.arm not in alone:
        return record
    return dataclasses.replace(record, micro=alone[record.arm].result)


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
    """Splits one device's records, oldest file line first, by setting, and each into newest run, earlier and the rest."""
    ordered = sorted(found, key=finished)  # stable: of two records of one second, the later line is the newer
    groups = sorted(_by_setting(ordered).items(), key=lambda item: item[0].order)
    folders = folder_names([key for key, _ in groups])
    return Device(slug, tuple(_setting(key, folder, group) for folder, (key, group) in zip(folders, groups, strict=True)))


def _by_setting(ordered: Sequence[Record]) -> dict[Trained, list[Record]]:
    """An arm belongs to the setting of the stock beside it, since its own recipe may be another."""
    runs: dict[str, list[Record]] = {}
    for record in ordered:
        runs.setdefault(record.run_id, []).append(record)
    groups: dict[Trained, list[Record]] = {}
    for record in ordered:
        groups.setdefault(trained(reference_of(record, runs[record.run_id]) or record), []).append(record)
    return groups


def _setting(key: Trained, folder: str, ordered: Sequence[Record]) -> Setting:
    run = tuple(record for record in ordered if record.run_id == ordered[-1].run_id)
    current = newest_by_arm(run)
    earlier = {arm: record for arm, record in newest_by_arm(ordered).items() if arm not in current}
    shown = {id(record) for record in (*current.values(), *earlier.values())}
    shown |= {id(record) for record in run if record.role in BASELINES}
    older = Counter(record.arm for record in ordered if id(record) not in shown)
    return Setting(key, folder, run, tuple(current.values()), tuple(earlier.values()), dict(older))


def newest_by_arm(ordered: Iterable[Record]) -> dict[str, Record]:
    """The last record of each arm, in the order in which the arms first appear."""
    return {record.arm: record for record in ordered}


def finished(record: Record) -> datetime:
    """When the arm finished; a time without a zone is UTC. Raises ValueError for what is no ISO 8601 time."""
    return jsonl.moment(record.finished_at)
