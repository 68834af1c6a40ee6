"""Every configuration that an autotuner may choose passes the op check, and what it chose is recorded.

An autotuner picks by time alone, so a configuration that computes something wrong ships on the first device on which it is
fast (torchao 4652: an fp8 store miscompiled in some configurations). The check runs each one, whatever it costs.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from abtest.opcheck import OpReport, check_op, small_workloads, workloads_for
from abtest.verdict import Level, Verdict
from kernels.contract import Exactness, Optimization, Workload
from kernels.registry import PACKAGES

if TYPE_CHECKING:
    from triton import Config
    from triton.runtime import Autotuner


Reports = list[tuple[str, str, OpReport]]

PRUNED, IDLE = "pruned for this workload", "the kernel isn't launched on this workload"


def tuners(optimization: Optimization) -> dict[str, Autotuner]:
    """The autotuned kernels of the optimization's own folder, by module and attribute; empty without Triton.

    A tuner below triton.heuristics is found, too, in Triton's interpreter as on a GPU. Imports the folder's modules, unless
    a package that they need is missing.
    """
    if _lacking(optimization):
        return {}
    for root in _folders(optimization):
        _import_below(root)
    return _tuners_below(_folders(optimization))


def chosen(optimization: Optimization) -> dict[str, str]:
    """What each autotuner that ran in this process chose, by module and attribute; several choices, one a shape, are joined.

    Those of the optimization's folder, and those of the packages that it needs, such as FLA's. Imports nothing.
    """
    if "triton" not in sys.modules:
        return {}
    found = _tuners_below((*_folders(optimization), *optimization.needs.packages))
    choices = {name: _choices(tuner) for name, tuner in found.items()}
    return {name: "; ".join(own) for name, own in sorted(choices.items()) if own}


def check_every_configuration(optimization: Optimization, device: torch.device, seed: int) -> Reports:
    """(kernel, configuration, report) for every configuration of every tuner of the optimization, on each small workload,
    on CUDA also in bf16; one that no small workload reaches is tried on the others that fit the device, up to the first.

    Kernels of the folder, and those of the packages that the op launches. One configuration is allowed at a time, also in
    Triton's interpreter, which can't time and so never chooses by itself; other tuners stay with what they chose last, or
    their first. NOT_RUN where the autotuner could not choose it either: it is pruned, asks for more than the device has, or
    its kernel isn't launched. Tuners are left as they were.
    """
    op = optimization.op
    if op is None:
        return []
    small = small_workloads(op) if device.type == "cuda" else workloads_for(op, device)
    larger = [workload for workload in workloads_for(op, device) if not workload.small]
    found, reports = tuners(optimization) | _launched(optimization, small, device, seed), []
    for name, tuner in found.items():
        for config in tuner.configs:
            with ExitStack() as stack:
                for other in found.values():
                    if other is not tuner:
                        stack.enter_context(_only(other, getattr(other, "best_config", None) or other.configs[0]))
                stack.enter_context(_only(tuner, config))
                own = [_check(optimization, workload, device, seed, tuner, config) for workload in small]
                for workload in larger:
                    if not all(_out_of_reach(report) for report in own):
                        break
                    own.append(_check(optimization, workload, device, seed, tuner, config))
            reports += [(name, str(config), report) for report in own]
    return reports


def complaints(reports: Reports, exactness: Exactness, device: torch.device) -> list[str]:
    """What speaks against shipping these kernels, a sentence each: what a configuration computes is wrong; or, on CUDA and
    for the optimization's own kernels, no workload of the op reaches it: then nothing is known of what may be chosen.
    A package prunes as it likes, and its kernels are here only because the op launches them."""
    accepted = {Level.NOT_RUN, Level.BITWISE, Level.ROUNDING} | ({Level.APPROX} if exactness is Exactness.APPROX else set())
    reached: dict[str, bool] = {}
    found = []
    for kernel, configuration, report in reports:
        name = f"{kernel} in {configuration}"
        if kernel.startswith(tuple(f"{package}." for package in PACKAGES)):
            reached[name] = reached.get(name, False) or not _out_of_reach(report)
        if report.verdict.level not in accepted:
            found.append(f"{name} on {report.workload.name}, {report.workload.dtype}: {report.verdict.reason}")
    if device.type == "cuda":
        found += [
            f"{name} is reached by no workload of the op, which needs one" for name, once in reached.items() if not once
        ]
    return found


def _out_of_reach(report: OpReport) -> bool:
    return report.verdict.level is Level.NOT_RUN and report.verdict.reason in (PRUNED, IDLE)


def _lacking(optimization: Optimization) -> bool:
    return any(importlib.util.find_spec(package) is None for package in ("triton", *optimization.needs.packages))


def _folders(optimization: Optimization) -> list[str]:
    return [f"{package}.{optimization.name}" for package in PACKAGES]


def _launched(
    optimization: Optimization, workloads: Sequence[Workload], device: torch.device, seed: int
) -> dict[str, Autotuner]:
    """Tuners of the packages that the optimization needs, which its op launches on any of the workloads."""
    if not optimization.needs.packages or _lacking(optimization):
        return {}
    found: dict[str, Autotuner] = {}
    for workload in workloads:
        check_op(optimization.op, workload, device, seed, optimization.exactness)  # loads its modules, and tunes
        known = _tuners_below(optimization.needs.packages)
        before = {name: getattr(tuner, "best_config", None) for name, tuner in known.items()}
        for tuner in known.values():
            tuner.best_config = None
        check_op(optimization.op, workload, device, seed, optimization.exactness)
        for name, tuner in known.items():
            if tuner.best_config is not None:
                found[name] = tuner
            else:
                tuner.best_config = before[name]
    return found


def _check(
    optimization: Optimization, workload: Workload, device: torch.device, seed: int, tuner: Autotuner, config: Config
) -> OpReport:
    from triton.compiler.errors import CompileTimeAssertionFailure
    from triton.runtime.errors import OutOfResources, PTXASError

    tuner.cache, tuner.best_config = {}, None
    try:
        report = check_op(optimization.op, workload, device, seed, optimization.exactness)
    except (OutOfResources, CompileTimeAssertionFailure, PTXASError) as error:  # those that an autotuner passes over
        reason = f"this device can't run it: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return OpReport(workload, str(device), seed, Verdict(Level.NOT_RUN, reason))
    launched = {tuner.best_config, *tuner.cache.values()} - {None}
    if config not in launched and (launched or report.passed):  # what failed before any launch counts against each
        return OpReport(workload, str(device), seed, Verdict(Level.NOT_RUN, PRUNED if launched else IDLE))
    return report


@contextmanager
def _only(tuner: Autotuner, config: Config) -> Iterator[None]:
    """Inside, the tuner chooses `config` without timing it, unless its author prunes it for the arguments at hand."""
    before = dict(vars(tuner))

    def prune(keywords: dict[str, Any]) -> list[Config]:
        fitting = tuner.configs
        if tuner.early_config_prune:
            fitting = tuner.early_config_prune(tuner.configs, tuner.nargs, **keywords)
        return [config] if config in fitting else list(fitting)[:1]

    def bench(*arguments: Any, **keywords: Any) -> list[float]:
        return [0.0] * 3

    changes = {"prune_configs": prune, "_bench": bench, "cache": {}, "cache_results": False, "best_config": None}
    vars(tuner).update(changes)  # cache_results: nothing of this goes to the disk
    try:
        yield
    finally:
        vars(tuner).clear()
        vars(tuner).update(before)


def _choices(tuner: Autotuner) -> list[str]:
    best = getattr(tuner, "best_config", None)
    return sorted({str(config) for config in tuner.cache.values()} or ({str(best)} if best is not None else set()))


def _tuners_below(roots: Sequence[str]) -> dict[str, Autotuner]:
    """Autotuners among the attributes of loaded modules under `roots`, each once, under the module that defines it."""
    found: dict[int, tuple[str, Autotuner]] = {}
    for module_name, module in sorted(sys.modules.items()):
        if not isinstance(module, ModuleType) or not any(f"{module_name}.".startswith(f"{root}.") for root in roots):
            continue
        for attribute, value in vars(module).items():
            tuner = _autotuner(value)
            if tuner is not None and (id(tuner) not in found or tuner.base_fn.__module__ == module_name):
                found[id(tuner)] = f"{module_name}.{attribute}", tuner
    return dict(sorted(found.values(), key=lambda pair: pair[0]))


def _autotuner(value: Any) -> Autotuner | None:
    """The autotuner among a kernel's decorators, or None."""
    from triton.runtime import Autotuner
    from triton.runtime.jit import KernelInterface

    while isinstance(value, KernelInterface):
        if isinstance(value, Autotuner):
            return value
        value = getattr(value, "fn", None)
    return None


def _import_below(root: str) -> None:
    if root not in sys.modules and importlib.util.find_spec(root) is None:
        return
    package = importlib.import_module(root)
    for found in pkgutil.iter_modules(getattr(package, "__path__", ())):
        _import_below(f"{root}.{found.name}")
