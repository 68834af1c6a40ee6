"""Reads what the reports allow on a device: `reports/<device>/shipping.toml`."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from loop.config import Config
from loop.errors import UserError

REPORTS = Path(__file__).resolve().parent.parent / "reports"


@dataclass(frozen=True)
class Shipping:
    """What to enable, and in words where that comes from."""

    enable: tuple[str, ...]
    why: str


def read_shipping(config: Config, device_slug: str, reports: Path = REPORTS) -> Shipping:
    """The optimizations that passed on this device, or none with the reason. Raises UserError for a damaged file."""
    path = reports / device_slug / "shipping.toml"
    if not path.is_file():
        return Shipping((), f"nothing: no {device_slug} in {reports.name}/; `python -m bench.run` measures this device")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        names = values["enable"]
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError) as error:
        raise UserError(f"{path}: not a shipping file ({error}); `python -m bench.report` renders it again") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: enable must be a list of names; `python -m bench.report` renders it again")
    measured = values.get("method", config.method)
    if measured != config.method:
        return Shipping(
            (), f"nothing: {path.parent.name}/{path.name} was measured for method {measured}, not {config.method}"
        )
    words = ", ".join(names) if names else "nothing"
    return Shipping(tuple(names), f"{words}: passed the gate and paid on {device_slug} ({path.parent.name}/{path.name})")
