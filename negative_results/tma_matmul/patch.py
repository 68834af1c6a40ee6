"""Swaps the linear layers for which this folder's table holds a win, as `sm121a_matmul` does for its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from kernels.contract import Needs
from negative_results.sm121a_matmul import patch
from negative_results.sm121a_matmul.dispatch import Engine
from negative_results.sm121a_matmul.tile import Tile

from .tile import TILES, takes

if TYPE_CHECKING:
    from loop.run import Run


def _matmul(a: Tensor, b: Tensor, tile: Tile) -> Tensor:
    from .kernel import matmul

    return matmul(a, b, tile)


ENGINE = Engine(
    name="tma_matmul",
    table=Path(__file__).with_name("table.toml"),
    needs=Needs(triton=True, capability=((9, 0), (12, 1))),
    tiles=TILES,
    matmul=_matmul,
    takes=takes,
)


def eligible(run: Run) -> str | None:
    """As `negative_results.sm121a_matmul.patch.eligible`, by this folder's table."""
    return patch.eligible(run, ENGINE)


def apply(run: Run) -> None:
    """As `negative_results.sm121a_matmul.patch.apply`, by this folder's table."""
    patch.apply(run, ENGINE)
