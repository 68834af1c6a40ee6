"""Swaps the linear layers for which the table of a device holds a win. `tma_matmul` swaps with the same functions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from kernels.contract import Needs
from kernels.registry import unmet
from kernels.swapping import is_watched
from loop.lora import adapters

from . import table
from .dispatch import DispatchedLinear, Engine
from .tile import TILES, Tile

if TYPE_CHECKING:
    from loop.run import Run


def _matmul(a: Tensor, b: Tensor, tile: Tile) -> Tensor:
    from .kernel import matmul

    return matmul(a, b, tile)


ENGINE = Engine(
    name="sm121a_matmul",
    table=Path(__file__).with_name("table.toml"),
    needs=Needs(triton=True),
    tiles=TILES,
    matmul=_matmul,
    takes=lambda a, b: True,
)


def eligible(run: Run, engine: Engine = ENGINE) -> str | None:
    """None, or why not: nowhere to run, no layer of the kind, or none with a product that was measured to be faster here."""
    reason = unmet(engine.needs, run.device)
    if reason:
        return reason
    if not plain_linears(run.model):
        return f"{type(run.model).__name__} has no plain nn.Linear without a bias"
    if not wins(run, engine):
        where, command = f"{table.device_key(run.device)}, {_rows(run)} rows", table.tuner(engine.table)
        return f"no shape of this model has a measured win on this device ({where}); `{command}` measures"
    return None


def apply(run: Run, engine: Engine = ENGINE) -> None:
    """Replaces the layers with a win. The weights stay the same objects. Raises ValueError when there is none."""
    swaps = wins(run, engine)
    if not swaps:
        raise ValueError(f"{type(run.model).__name__} has no nn.Linear with a measured win on this device")
    for name, tiles in swaps.items():
        run.model.set_submodule(name, DispatchedLinear(run.model.get_submodule(name), engine, tiles))


def wins(run: Run, engine: Engine) -> dict[str, table.Tiles]:
    """The layers with a win for as many rows as a micro-step of this run has, by name, and their tiles for any number."""
    entries, device, rows = table.load(engine.table), table.device_key(run.device), table.bucket(_rows(run))
    found = {name: table.winners(entries, device, layer.weight) for name, layer in plain_linears(run.model).items()}
    return {name: tiles for name, tiles in found.items() if any(own == rows for _, own in tiles)}


def plain_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every nn.Linear that is nothing more, by name: the base under an adapter, too, but not the adapter's own two."""
    held = {id(weight) for adapter in adapters(model) for weight in (adapter.a, adapter.b)}
    return {name: m for name, m in model.named_modules() if name and is_plain(m) and id(m.weight) not in held}


def is_plain(module: nn.Module) -> bool:
    """Whether `module` is an nn.Linear without a bias, and nothing watches its calls, which a swap would lose."""
    return type(module) is nn.Linear and module.bias is None and not is_watched(module)


def _rows(run: Run) -> int:
    return run.config.data.pack_length * run.config.data.packs_per_micro_step
