"""The flags of `python -m bench.run`, whether they make sense, and what all records that it keeps share."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from abtest.command import check_gate, command_line, default_for
from abtest.settings import GateConfig
from bench.ceilings import Ceilings
from bench.clock import TimingConfig
from bench.records import read, writing_to
from loop.config import Config
from loop.errors import UserError
from loop.recipe import load_recipe, to_plain

ROOT = Path(__file__).resolve().parent.parent
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# What differs from command to command of one run, and what is a path of somebody's machine: no part of the recipe.
NOT_THE_RECIPE = ("arms", "peers", "combine", "micro", "run", "minutes", "reports", "output")


@dataclass(frozen=True)
class Command(Config):
    """Flags of `python -m bench.run`."""

    # by name; "all" optimizations, the "peers", or "negative" for negative_results/; a+b+c: these together, as one arm
    arms: tuple[str, ...] = ("all",)
    peers: bool = (
        False  # add what a user could pick instead, bench/peers/: gated, timed whatever the gate says, never shipped
    )
    # when these arms are done, one more with everything on that passed in the run and may be timed, and then the peers;
    # without it peers keep their places among these arms
    combine: bool = True
    micro: bool = True  # every lossless optimization's op on its own, too
    run: str | None = None  # the run that the records belong to: a name to begin one, or to go on with it; None: a new one
    minutes: float | None = None  # begin no arm that would probably end later than this after the start; None: no limit
    gate: GateConfig = field(default_factory=GateConfig)
    timing: TimingConfig = field(default_factory=TimingConfig)
    reports: Path = ROOT / "reports"


def default(arguments: list[str]) -> Command:
    """The gate's recipe for the device, with how much to time added."""
    command = default_for(arguments, Command())
    return load_recipe(Path(__file__).parent / "recipes" / f"{command.device}.toml", command)


def check(command: Command) -> None:
    """Raises UserError for settings with which nothing can be proved, or timed, or named."""
    check_gate(command)
    for name, value, least in (
        ("timing.blocks", command.timing.blocks, 2), ("timing.micro_batches", command.timing.micro_batches, 1),
        ("timing.most_blocks", command.timing.most_blocks, 0),
    ):  # fmt: skip
        if value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}")
    if command.run is not None and not RUN_ID.fullmatch(command.run):
        raise UserError(f"--run {command.run}: letters, digits, '.', '_' and '-' are expected, at most 100")
    if command.minutes is not None and not command.minutes > 0:
        raise UserError(f"--minutes is {command.minutes}; it must be above 0")


def records_file(reports: Path, device_slug: str) -> Path:
    """Where this device's records are. What is the user's to mend is to mend now, not after the measurements: raises
    UserError for a damaged line or a path that can't be."""
    path = reports / "data" / device_slug / "records.jsonl"
    with writing_to(reports):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            read(path)
    return path


def recipe_of(command: Command, dtype: str) -> dict[str, Any]:
    """What was trained, gated and timed, as JSON values: the same in all commands of a run."""
    recipe = to_plain(command) | {"dtype": dtype, "steps": command.gate.steps}
    for name in NOT_THE_RECIPE:
        recipe.pop(name, None)
    recipe["gate"].pop("oracle_cache", None)
    return recipe


def new_run_id(environment: dict[str, Any]) -> str:
    """No other command's: several may be started in the same second."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}-{(environment['git_sha'] or 'nogit')[:7]}"


def facts_of(run_id: str, recipe: dict[str, Any], environment: dict[str, Any], ceilings: Ceilings) -> dict[str, Any]:
    """What all records of this command share. `data` is known once the reference is built."""
    measured = {
        "matmul_flops_per_s": ceilings.matmul_flops_per_s,
        "matmul_dtype": ceilings.matmul_dtype,
        "copy_bytes_per_s": ceilings.copy_bytes_per_s,
    }
    return {
        "run_id": run_id, "environment": environment | measured, "recipe": recipe, "data": {},
        "command": command_line("bench.run", sys.argv[1:]),
    }  # fmt: skip
