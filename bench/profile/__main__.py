"""`python -m bench.profile`: where the time and the memory of a training step go, for any set of optimizations.

A table goes to stderr, and one JSON document is the last line of stdout. With --record the profile is kept under
reports/data/profile and the reports are rendered. No gate is asked: what is profiled is not thereby lossless.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from abtest.command import default_for
from bench.command import Command as Gated
from loop.cli import guarded, parse
from loop.config import Config, config_of
from loop.device import device_slug
from loop.errors import UserError
from loop.model import resolve_device
from loop.recipe import to_plain

ABOUT = "Says where the time and the memory of a training step go."
INTERPRETED = "runs in Triton's interpreter on a CPU, whose time says nothing; leave it out, or profile it on a GPU"
NOT_THE_RECIPE = ("output", "resume", "save_every", "steps")


@dataclass(frozen=True)
class Command(Config):
    """Flags of `python -m bench.profile`."""

    steps: int = 10  # repetitions that are timed, of the micro-step, of the update and of the whole step
    optimizations: tuple[str, ...] = ()  # what is switched on; nothing: stock
    shipping: bool = False  # what shipping.toml allows here is switched on instead
    traced: int = 2  # repetitions under the profiler
    micro_batches: int = 2  # micro-steps in a row in each repetition of the micro-step
    warmup: int = 3  # repetitions of each phase before anything counts
    stack_seconds: float = 5.0  # how long py-spy looks at the host; 0: not at all
    record: bool = False  # keep the profile as a line of reports/data/profile/<device>.jsonl, and render the reports
    reports: Path = Path(__file__).resolve().parents[2] / "reports"  # the folder of reports


def default(arguments: list[str]) -> Command:
    """What gates and timings train on this device."""
    given = {name: value for name, value in vars(config_of(default_for(arguments, Gated()))).items() if name != "steps"}
    return Command(**given)


def check(command: Command) -> None:
    """Raises UserError for numbers that can't be, and for flags that are another command's."""
    for name, least in (("steps", 1), ("traced", 1), ("micro_batches", 1), ("warmup", 1), ("stack_seconds", 0)):
        value = getattr(command, name)
        if not value >= least:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    if command.output is not None or command.resume:
        raise UserError("--output and --resume are for python -m loop.train; nothing is saved here")
    if command.shipping and command.optimizations:
        raise UserError("--shipping says what is switched on; leave --optimizations out")


def chosen(command: Command, device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Which optimizations to switch on, sorted. Raises UserError for unknown names, for those that can't be on together, and
    on a CPU for those that Triton would interpret."""
    from kernels.registry import select
    from loop.shipping import read_shipping

    names = command.optimizations
    if command.shipping:
        word = str(dtype).removeprefix("torch.")
        allowed = read_shipping(config_of(command), device_slug(device), word, command.reports)
        _say(f"shipping {allowed.why}")
        names = allowed.enable
    picked = select(names)
    for one in picked:
        if one.needs.triton and device.type != "cuda":
            raise UserError(f"--optimizations: {one.name} {INTERPRETED}")
    return tuple(one.name for one in picked)


def main(argv: list[str] | None = None) -> int:
    """Prints the profile. Raises UserError for what the user must put right."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = parse(default(arguments), "python -m bench.profile", ABOUT, arguments)
    device, dtype = resolve_device(command)
    check(command)
    names = chosen(command, device, dtype)
    keeper = None
    if command.record:
        from bench.profile.records import recorder

        keeper = recorder(device, command.reports, arguments)
    result = _profile(command, names, dtype)
    if keeper is not None:
        keeper.keep(result)
    _show(result)
    print(json.dumps(_printed(result), ensure_ascii=False, allow_nan=False))
    if keeper is not None:
        keeper.render()
    return 0


def _profile(command: Command, names: tuple[str, ...], dtype: torch.dtype) -> dict[str, Any]:
    """The result that a record holds."""
    from bench.profile.measure import Effort, profile
    from kernels.registry import with_recipes

    config = with_recipes(config_of(command), names)
    effort = Effort(command.steps, command.traced, command.micro_batches, command.warmup, command.stack_seconds)
    recipe = to_plain(config) | {"dtype": str(dtype).removeprefix("torch.")}
    asked = {
        "optimizations": list(names), "shipping": command.shipping,
        "recipe": {name: value for name, value in recipe.items() if name not in NOT_THE_RECIPE},
    }  # fmt: skip
    return asked | profile(config, names, effort, _say)


def _show(result: dict[str, Any]) -> None:
    from bench.profile.show import show

    show(result)


def _printed(result: dict[str, Any]) -> dict[str, Any]:
    """Without the tree of stacks, which is for a drawing."""
    stacks = {name: value for name, value in result["stacks"].items() if name not in ("frames", "nodes")}
    return result | {"stacks": stacks}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    guarded(main)
