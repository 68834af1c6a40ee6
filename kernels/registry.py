"""Finds optimizations by their folders, and switches them on."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from kernels.contract import Exactness, Fails, Needs, Optimization
from loop.errors import UserError
from loop.recipe import from_plain

if TYPE_CHECKING:
    from loop.run import Run

C = TypeVar("C")
NEGATIVE = "negative_results"
PACKAGES = ("kernels", NEGATIVE)
ORDER = [Exactness.BITWISE, Exactness.ROUNDING, Exactness.APPROX]  # strongest claim first


def discover() -> dict[str, Optimization]:
    """Every optimization of `kernels/` and `negative_results/`, by name, sorted. The folder's name is the name."""
    found = {}
    for package in PACKAGES:
        root = Path(importlib.import_module(package).__file__).parent
        for init in sorted(root.glob("*/__init__.py")):
            optimization = importlib.import_module(f"{package}.{init.parent.name}").OPTIMIZATION
            if optimization.name != init.parent.name:
                raise ValueError(f"{init}: OPTIMIZATION is named {optimization.name!r}; the folder's name is expected")
            if optimization.name in found:
                raise ValueError(f"{init}: a second optimization named {optimization.name!r}")
            if optimization.fails != Fails() and package != NEGATIVE:
                raise ValueError(f"{init}: OPTIMIZATION says where it fails; such a folder belongs in {NEGATIVE}/")
            found[optimization.name] = optimization
    return dict(sorted(found.items()))


def is_negative(name: str) -> bool:
    """Whether the optimization `name` is in `negative_results/`: gated and timed as any other, and never shipped."""
    return importlib.util.find_spec(f"{NEGATIVE}.{name}") is not None


def module_of(name: str) -> str:
    """The dotted name of the folder of the optimization `name`."""
    return f"{NEGATIVE if is_negative(name) else 'kernels'}.{name}"


def select(names: Iterable[str]) -> list[Optimization]:
    """The named optimizations, sorted. Raises UserError for an unknown name or two that conflict."""
    known, chosen = discover(), []
    for name in sorted(set(names)):
        if name not in known:
            raise UserError(f"no optimization is named {name!r}; there are: {', '.join(known)}")
        chosen.append(known[name])
    for one in chosen:
        for other in chosen:
            if other.name in one.conflicts:
                raise UserError(f"{one.name} and {other.name} can't be on together; leave one out")
    return chosen


def with_recipes(config: C, names: Iterable[str]) -> C:
    """`config` with what the recipes of the named optimizations change. What they are compared with is stock of it."""
    for optimization in select(names):
        config = from_plain(config, dict(optimization.recipe))
    return config


def unmet(needs: Needs, device: torch.device) -> str | None:
    """None when this machine has what `needs` names, else in words what is missing."""
    if needs.cuda and device.type != "cuda":
        return f"needs a CUDA device; this run is on {device.type}"
    if needs.triton and importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed"
    if needs.triton and device.type != "cuda" and not interpreting():
        return "has Triton kernels; without a GPU they run only with TRITON_INTERPRET=1, set before triton is imported"
    for package in needs.packages:
        if importlib.util.find_spec(package) is None:
            return f"needs the package {package}, which is not installed"
    if needs.capability is not None and device.type == "cuda":
        low, high = needs.capability
        have = torch.cuda.get_device_capability(device)
        if not low <= have <= high:
            return f"needs compute capability {low[0]}.{low[1]} to {high[0]}.{high[1]}; this device has {have[0]}.{have[1]}"
    if needs.known_wrong is not None and device.type == "cuda":
        return needs.known_wrong(device)
    return None


def in_update(name: str) -> bool:
    """Whether the optimization called `name` works in the optimizer's update alone; of an unknown one nobody says so."""
    known = discover().get(name)
    return known is not None and known.in_update


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter in this process."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def refusal(optimization: Optimization, run: Run) -> str | None:
    """None when `optimization` can run on `run`, else the reason in words."""
    return unmet(optimization.needs, run.device) or optimization.eligible(run)


def enable(run: Run, names: Iterable[str]) -> None:
    """Switches on what is named and can run. `run.enabled` and `run.refused` (name -> reason) say what became of each."""
    for optimization in select(names):
        reason = refusal(optimization, run)
        if reason is None:
            optimization.apply(run)
            run.enabled.append(optimization.name)
        else:
            run.refused[optimization.name] = reason


def weakest_claim(names: Iterable[str]) -> Exactness:
    """What a combination may claim: the weakest of its members' claims."""
    return max((optimization.exactness for optimization in select(names)), key=ORDER.index, default=Exactness.BITWISE)
