"""The flags of `python -m bench.search`, and the run that its answer belongs to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abtest.command import default_for
from abtest.settings import GateConfig
from bench.clock import TimingConfig
from bench.command import ROOT, Command, check, new_run_id
from bench.ledger import Ledger
from bench.records import Record
from bench.search.candidates import same_training
from loop.config import Config
from loop.errors import UserError
from loop.recipe import load_recipe


@dataclass(frozen=True)
class SearchConfig:
    """How much is timed. Intervals are looked at after `blocks` samples of each set, then after twice as many."""

    width: int = 4  # sets that are timed in turn with the best so far, each in a process of its own
    blocks: int = 6  # samples of each set, at least
    most_blocks: int = 24  # samples of each set, at most


@dataclass(frozen=True)
class SearchCommand(Config):
    """Flags of `python -m bench.search`."""

    arms: tuple[str, ...] = ()  # optimizations to search among; none named: all that have passed in this setting here
    begin: tuple[str, ...] = ()  # the set to begin with, instead of stock: names, or a+b+c
    run: str | None = None  # the run that the answer belongs to; None: the setting's newest, if this code and recipe made it
    minutes: float | None = None  # time no set that would probably end later than this after the start; None: no limit
    accept: bool = False  # when the minutes are over, gate the best set so far; else another command may go on
    search: SearchConfig = field(default_factory=SearchConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    timing: TimingConfig = field(default_factory=TimingConfig)  # of the gated answer; `search` has the blocks on the way
    reports: Path = ROOT / "reports"

    @property
    def bench(self) -> Command:
        """The same as a command of `bench.run`, which gates the answer."""
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(Config)}
        own = {name: getattr(self, name) for name in ("run", "minutes", "gate", "timing", "reports")}
        return Command(**shared, **own)

    @property
    def clock(self) -> TimingConfig:
        """How sets are timed on the way."""
        return dataclasses.replace(self.timing, blocks=self.search.blocks)


def default(arguments: list[str]) -> SearchCommand:
    """What `bench.run` gates and times by default on the device."""
    command = default_for(arguments, SearchCommand())
    return load_recipe(ROOT / "bench" / "recipes" / f"{command.device}.toml", command)


def check_search(command: SearchCommand) -> None:
    """Raises UserError for settings with which nothing can be searched, gated or timed."""
    check(command.bench)
    search = command.search
    for name, value, least in (
        ("width", search.width, 1), ("blocks", search.blocks, 2), ("most_blocks", search.most_blocks, search.blocks),
    ):  # fmt: skip
        if value < least:
            raise UserError(f"search.{name} is {value}; it must be at least {least}")


def run_of(
    command: SearchCommand, path: Path, found: Sequence[Record], recipe: dict[str, Any], environment: dict[str, Any],
    say: Callable[[str], None],
) -> Ledger:  # fmt: skip
    """The run that is named; else the newest of this setting among `found`, the device's records in `path`, so that the
    answer stands beside the arms that it is made of; else a new one, as where other code or another recipe made those.
    Raises UserError for a named run that another recipe or another state of the code has made."""
    if command.run is not None:
        ledger = Ledger(path, command.run, recipe)
        ledger.check(environment)
        return ledger
    alike = [record for record in found if record.role == "reference" and same_training(record.recipe, recipe)]
    if alike:
        ledger = Ledger(path, alike[-1].run_id, recipe)
        try:
            ledger.check(environment)
        except UserError as error:
            say(f"a run of its own, since the newest one is of something else: {error}")
        else:
            return ledger
    return Ledger(path, new_run_id(environment), recipe)
