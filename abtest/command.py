"""What the commands that gate have in common: recipes, settings that make sense, and how much work lies ahead."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from abtest.settings import GateConfig
from loop.config import Config, config_of
from loop.errors import UserError
from loop.recipe import load_recipe, to_plain

RECIPES = Path(__file__).parent / "recipes"
# Where a machine keeps things, which changes no result: no part of a record.
MACHINE_PATHS = ("--reports", "--output", "--units", "--gate.oracle-cache", "--data.cache-dir")


def default_for(arguments: list[str], command: Any) -> Any:
    """`command` with the recipe for the device: the 2B shape where there is a GPU, the small model elsewhere."""
    wants_cpu = any(a == "--device=cpu" or arguments[i : i + 2] == ["--device", "cpu"] for i, a in enumerate(arguments))
    name = "cuda" if torch.cuda.is_available() and not wants_cpu else "cpu"
    return load_recipe(RECIPES / f"{name}.toml", command)


def command_line(module: str, arguments: Sequence[str]) -> str:
    """What a record says to type for the same again: the command without paths of the machine that measured."""
    kept: list[str] = []
    left = iter(arguments)
    for argument in left:
        if argument in MACHINE_PATHS:
            next(left, None)
        elif argument.split("=", 1)[0] not in MACHINE_PATHS:
            kept.append(argument)
    return shlex.join(["python", "-m", module, *kept])


def gate_recipe(command: Any) -> dict[str, Any]:
    """What a record keeps of a command that gates: its settings, without where this machine keeps what it makes."""
    recipe = to_plain(command)
    for name in ("reports", "output", "units"):
        recipe.pop(name, None)
    recipe["gate"].pop("oracle_cache", None)
    return recipe


def gate_config(config: Config, gate: GateConfig) -> Config:
    """The arms' configuration: as many steps as the gate runs, and attention that repeats itself while it does."""
    return dataclasses.replace(config_of(config), steps=gate.steps, repeatable_attention=True)


def check_gate(command: Any) -> None:
    """Raises UserError for settings with which nothing can be proved."""
    if command.lora.dropout:
        raise UserError("lora.dropout must be 0 here: gradients are compared with an oracle that drops nothing out")
    if command.output is not None or command.resume:
        raise UserError("--output and --resume are for python -m loop.train; this command keeps records only")
    for name, least in (("steps", 3), ("replicas", 2), ("probes", 3), ("repeats", 2), ("parallel", 1)):
        value = getattr(command.gate, name)
        if value < least:
            raise UserError(f"gate.{name} is {value}; it must be at least {least}")


def planned_units(gate: GateConfig) -> int:
    """Units of work for the progress bar: a step of training, a probe, or a structural check."""
    return reference_units(gate) + arm_units(gate)


def reference_units(gate: GateConfig) -> int:
    return 8 * gate.probes + (2 + gate.replicas) * gate.steps + 8


def arm_units(gate: GateConfig) -> int:
    return 4 * gate.probes + gate.steps + 8
