"""Which op-level test catches a defect that the whole gate lets through: said by the catalogue itself."""

from __future__ import annotations

import importlib
import pkgutil


def op_level_tests() -> dict[str, str]:
    """Name of a mutant -> id of the test, from every module of the catalogue that defines OP_LEVEL_TESTS."""
    from abtest import catalogue  # builds on the whole loop, which a report without survivors has no use for

    found: dict[str, str] = {}
    for module in sorted(pkgutil.iter_modules(catalogue.__path__), key=lambda module: module.name):
        found |= getattr(importlib.import_module(f"{catalogue.__name__}.{module.name}"), "OP_LEVEL_TESTS", {})
    return found
