"""Every planted defect and every honest rewrite, by name. One file a family."""

from __future__ import annotations

import importlib
import pkgutil

from abtest.catalogue.planted import Case, Planted, cases
from loop.errors import UserError

__all__ = ["Case", "Planted", "cases", "catalogue", "find"]


def catalogue() -> dict[str, Planted]:
    """Everything that can be planted: the `PLANTED` of each module of this package, by name."""
    found: dict[str, Planted] = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        for planted in getattr(importlib.import_module(f"{__name__}.{module.name}"), "PLANTED", ()):
            if planted.name in found:
                raise ValueError(f"two things to plant are named {planted.name!r}")
            found[planted.name] = planted
    return found


def find(case_id: str) -> Case:
    """The case `name:layer:magnitude`; any positive magnitude will do. Raises UserError for one that there is not."""
    known = catalogue()
    name, _, rest = case_id.partition(":")
    if name not in known:
        raise UserError(f"--plant {case_id}: nothing to plant is named {name!r}; there are {', '.join(sorted(known))}")
    planted = known[name]
    layer, _, strength = rest.partition(":")
    try:
        magnitude = float(strength)
    except ValueError:
        magnitude = -1.0
    if layer not in planted.layers or not (magnitude > 0 or magnitude in planted.magnitudes):
        raise UserError(
            f"--plant {case_id}: {', '.join(case.id for case in cases(planted))} or another magnitude is expected"
        )
    return Case(planted, layer, magnitude)
