"""Reads what the reports allow on a device: `reports/<device>/shipping.toml`, with a table for each setting."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loop.config import Config
from loop.errors import UserError

REPORTS = Path(__file__).resolve().parent.parent / "reports"
SCHEMA = 2
ASSISTANT = "assistant"  # `data.supervise` where a setting does not name it
AGAIN = "`python -m bench.report` renders it again"


@dataclass(frozen=True)
class Shipping:
    """What to enable, and in words where that comes from."""

    enable: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Setting:
    """One `[[setting]]`: what was trained, and what passed there and paid. pack_length in tokens, None if unknown.
    supervise: as in the recipe's data. rank: of LoRA's adapters, None if unknown or without them."""

    model: str
    method: str
    dtype: str
    pack_length: int | None
    supervise: str
    rank: int | None
    enable: tuple[str, ...]

    def __str__(self) -> str:
        names = ", ".join(self.enable) or "nothing"
        return f"{self.model} {self.method} {self.dtype} ({names})"


def read_shipping(config: Config, device_slug: str, dtype: str, reports: Path = REPORTS) -> Shipping:
    """The optimizations that passed on this device in the setting at hand, or none with the reason.

    A setting is the one at hand if model, method and `dtype`, what "auto" came to, are the same to the letter: a folder may
    hold the very architecture of a named shape, but nothing here says so. Of several pack lengths the nearest counts, of two
    equally near the shorter; of two that differ in what is supervised, the one that does as `config`; then the nearest rank.
    Raises UserError for a damaged file and for one of another schema.
    """
    path = reports / device_slug / "shipping.toml"
    where = f"{path.parent.name}/{path.name}"
    if not path.is_file():
        return Shipping((), f"nothing: no {device_slug} in {reports.name}/; `python -m bench.run` measures this device")
    settings = _settings(path)
    wanted = (config.model, config.method, dtype)
    fitting = [setting for setting in settings if (setting.model, setting.method, setting.dtype) == wanted]
    if not fitting:
        return Shipping((), f"nothing: {where} was measured for {_instead(settings, wanted)}")
    length, supervise, rank = config.data.pack_length, config.data.supervise, config.lora.rank
    chosen = min(
        fitting, key=lambda s: (_distance(s.pack_length, length), s.supervise != supervise, _distance(s.rank, rank))
    )
    at = "" if chosen.pack_length in (None, length) else f" at pack length {chosen.pack_length}"
    at += "" if chosen.rank in (None, rank) else f" with rank {chosen.rank}"
    names = f"{', '.join(chosen.enable)}:" if chosen.enable else "nothing: no optimization"
    return Shipping(chosen.enable, f"{names} passed the gate and paid on {device_slug}{at} ({where})")


def _distance(measured: int | None, wanted: int) -> tuple[bool, int, int]:
    return (True, 0, 0) if measured is None else (False, abs(measured - wanted), measured)


def _instead(settings: Sequence[Setting], wanted: tuple[str, str, str]) -> str:
    """What was measured instead, and how to have it all the same."""
    words = ", ".join(dict.fromkeys(map(str, settings))) or "nothing"
    alike = [setting.enable for setting in settings if (setting.method, setting.dtype) == wanted[1:] and setting.enable]
    way = (
        f"`--enable {' '.join(alike[0])}` switches that on all the same"
        if alike
        else "`--enable NAME ...` switches on what you choose"
    )
    return f"{words}, not {' '.join(wanted)}; {way}"


def _settings(path: Path) -> list[Setting]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not a shipping file ({error}); {AGAIN}") from error
    schema = values.get("schema", 1)
    if schema != SCHEMA:
        raise UserError(f"{path}: schema {schema}, not {SCHEMA}; {AGAIN}")
    tables = values.get("setting", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"{path}: setting must be a list of tables, [[setting]]; {AGAIN}")
    return [_setting(table, f"{path}: setting {number}") for number, table in enumerate(tables, 1)]


def _setting(table: dict[str, Any], where: str) -> Setting:
    for key in ("model", "method", "dtype"):
        if not isinstance(table.get(key), str):
            raise UserError(f"{where}: {key} must be a text; {AGAIN}")
    names, supervise = table.get("enable"), table.get("supervise", ASSISTANT)
    for key in ("pack_length", "rank"):
        if table.get(key) is not None and type(table[key]) is not int:
            raise UserError(f"{where}: {key} must be a whole number; {AGAIN}")
    if not isinstance(supervise, str):
        raise UserError(f"{where}: supervise must be a text; {AGAIN}")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: enable must be a list of names; {AGAIN}")
    own = (table["model"], table["method"], table["dtype"], table.get("pack_length"), supervise, table.get("rank"))
    return Setting(*own, tuple(names))
