"""The table of what was measured: for each device and product, the fastest tile and whether it beats cuBLAS.

A TOML file, written by `tune.py` alone. What is not in it was not measured, and goes to cuBLAS.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loop.device import device_name
from loop.errors import UserError
from loop.files import write_text

from .tile import Tile

PRODUCTS = ("y", "dx", "dw")  # x W^T, dy W and dy^T x: what memory holds transposed is B, nothing, and A
HEADING = "# Measured by `{command}`, which alone writes here; what is not in it goes to cuBLAS.\n"

Tiles = Mapping[tuple[str, int], Tile]  # one layer's: product and bucket of rows -> the tile that won


@dataclass(frozen=True)
class Entry:
    """One product of a linear layer [out_features, in_features] on one device, measured.

    rows: the bucket of T. tile: the fastest of those that were tried; wins: whether it is faster than cuBLAS, the whole 95 %
    interval. ratio: cuBLAS's time over the tile's, the median of pairs, ratio_low and ratio_high its interval.
    measured_rows: the T it was measured at; versions: of torch and Triton.
    """

    device: str
    dtype: str
    product: str
    rows: int
    out_features: int
    in_features: int
    tile: Tile
    wins: bool
    ratio: float
    ratio_low: float
    ratio_high: float
    measured_rows: int
    versions: str

    @property
    def key(self) -> tuple[str, str, str, int, int, int]:
        return self.device, self.dtype, self.product, self.rows, self.out_features, self.in_features


def tuner(path: Path) -> str:
    """The command that writes the table at `path`, which lies in its kernel's folder."""
    return f"python -m {path.parent.parent.name}.{path.parent.name}.tune"


def bucket(rows: int) -> int:
    """The power of two that `rows` is rounded up to: what was measured at one T holds for those near it."""
    return 1 << max(rows - 1, 0).bit_length()


def device_key(device: torch.device) -> str:
    """A device as the table names it, such as "NVIDIA GB10, sm_121"."""
    if device.type != "cuda":
        return device_name(device)
    major, minor = torch.cuda.get_device_capability(device)
    return f"{device_name(device)}, sm_{major}{minor}"


def winners(entries: Iterable[Entry], device: str, weight: torch.Tensor) -> Tiles:
    """The tiles that beat cuBLAS for a weight [out, in] on a device, by product and bucket; dw only where it trains."""
    own = (entry for entry in _of(entries, device, weight) if entry.wins)
    return {(entry.product, entry.rows): entry.tile for entry in own if entry.product != "dw" or weight.requires_grad}


def fastest(entries: Iterable[Entry], device: str, weight: torch.Tensor, rows: int) -> dict[str, Tile]:
    """The tile that was fastest for each product of a weight with so many rows, whether or not it beats cuBLAS."""
    return {entry.product: entry.tile for entry in _of(entries, device, weight) if entry.rows == bucket(rows)}


def _of(entries: Iterable[Entry], device: str, weight: torch.Tensor) -> Iterator[Entry]:
    wanted = (device, str(weight.dtype).removeprefix("torch."), *weight.shape)
    return (e for e in entries if (e.device, e.dtype, e.out_features, e.in_features) == wanted)


def load(path: Path) -> list[Entry]:
    """Every entry. Raises UserError naming the file and the entry for what is no table."""
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8")).get("entry", [])
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read: {error}") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: entry is {rows!r}; tables [[entry]] are expected")
    return [_entry(row, f"{path}: entry {index + 1}") for index, row in enumerate(rows)]


def merged(old: Iterable[Entry], new: Iterable[Entry]) -> list[Entry]:
    """All of both, sorted; of two for the same product the new one."""
    found = {entry.key: entry for entry in (*old, *new)}
    return [found[key] for key in sorted(found)]


def save(path: Path, entries: Iterable[Entry]) -> None:
    """Replaces the table, whole or not at all."""
    blocks = [HEADING.format(command=tuner(path))]
    for entry in entries:
        values = dataclasses.asdict(entry) | {"tile": [*map(int, entry.tile)]}
        blocks.append("\n[[entry]]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))
    write_text(path, "".join(blocks))


def _entry(row: Any, where: str) -> Entry:
    fields = {field.name: field.type for field in dataclasses.fields(Entry)}
    if not isinstance(row, dict) or row.keys() != fields.keys():
        raise UserError(f"{where}: the keys {', '.join(fields)} are expected, not {', '.join(row)}")
    kinds = {"str": str, "int": int, "bool": bool, "float": float, "Tile": list}
    for name, kind in fields.items():
        if type(row[name]) is not kinds[kind]:
            raise UserError(f"{where}: {name} is {row[name]!r}; a {kinds[kind].__name__} is expected")
    if row["product"] not in PRODUCTS:
        raise UserError(f"{where}: product is {row['product']!r}; one of {', '.join(PRODUCTS)} is expected")
    return Entry(**row | {"tile": _tile(row["tile"], where)})


def _tile(numbers: list[Any], where: str) -> Tile:
    if len(numbers) != len(Tile._fields) or not all(type(number) is int for number in numbers):
        raise UserError(
            f"{where}: tile is {numbers}; {len(Tile._fields)} whole numbers are expected: {', '.join(Tile._fields)}"
        )
    *sizes, specialised = numbers
    return Tile(*sizes, bool(specialised))
