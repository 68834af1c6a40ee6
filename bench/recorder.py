"""Keeps what is measured, a line a measurement, in reports/data/<kind>/<device_slug>.jsonl: `--record` of a command."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abtest import jsonl
from bench.records import writing_to

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Recorder:
    """Where the records of measurements that are about to begin go, and what of them is known already.

    record: makes one of when it was finished (ISO 8601, UTC), the command, the environment and the result.
    """

    reports: Path
    folder: str
    command: str
    environment: dict[str, Any]
    record: Callable[[str, str, dict[str, Any], dict[str, Any]], Any]

    @property
    def path(self) -> Path:
        return self.reports / "data" / self.folder / f"{self.environment['device_slug']}.jsonl"

    def keep(self, result: dict[str, Any]) -> None:
        """Appends a result of JSON values. Raises UserError where the file can't be written."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        record = self.record(now, self.command, self.environment, json.loads(jsonl.dumps(result)))
        with writing_to(self.reports):
            jsonl.append(self.path, jsonl.dumps(record))

    def render(self) -> None:
        """Renders the reports, beside no other command that does. Raises UserError for a damaged record of any command."""
        from bench.claims import alone_in
        from bench.report import render

        data_dir = self.reports / "data"
        with writing_to(self.reports), alone_in(data_dir):
            render(data_dir, self.reports)


def begin(
    module: str, folder: str, record: Callable[..., Any], read: Callable[[Path], Any],
    device: torch.device, reports: Path, arguments: Sequence[str],
) -> Recorder:  # fmt: skip
    """What is the user's to mend is to mend now, not after the measurement: raises UserError for a line that `read` finds
    damaged or a path that can't be. arguments: the command's; which folder the record goes to is no part of it."""
    from abtest.command import command_line
    from abtest.environment import describe

    made = Recorder(reports, folder, command_line(module, arguments), describe(device), record)
    with writing_to(reports):
        made.path.parent.mkdir(parents=True, exist_ok=True)
        if made.path.exists():
            read(made.path)
    return made
