"""One unit of the sensitivity run: a reference with its oracle and noise floor, and everything that is gated against it."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from abtest.arm import ArmFailed, ArmSpec
from abtest.catalogue import Case, find
from abtest.evidence import Evidence, same_bits
from abtest.experiment import Candidate
from abtest.in_process import InProcessExperiment
from abtest.settings import GateConfig
from abtest.verdict import Check, Level, Verdict
from kernels.contract import Exactness
from loop.config import Config


@dataclass(frozen=True)
class Unit:
    """A method and a seed. benign, mutants, swept: ids of cases. carrier: optimizations that are on in every arm, the
    reference included: what is measured is the gate, not them."""

    config: Config
    settings: GateConfig
    carrier: tuple[str, ...]
    split: str
    benign: tuple[str, ...]
    mutants: tuple[str, ...]
    swept: tuple[str, ...]


def run_unit(unit: Unit, folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Gates every case of the unit. Answers with their lines, and those of the sweep."""
    if unit.config.device == "cpu":
        torch.set_num_threads(1)
    folder.mkdir(parents=True)
    settings = dataclasses.replace(unit.settings, oracle_cache=folder / "oracle")
    with InProcessExperiment(unit.config, settings, folder, {}, _silent, unit.carrier) as experiment:
        experiment.prepare()
        lines, sweep = [], []
        total = len(unit.benign) + len(unit.mutants) + len(unit.swept)
        for number, case in enumerate((*unit.benign, *unit.mutants)):
            lines.append(_line(unit, experiment.reference, find(case), _gate(experiment, unit, case)))
            _tell(unit, number + 1, total)
        for number, case in enumerate(unit.swept):
            sweep.append(_swept(unit, find(case), _gate(experiment, unit, case)))
            _tell(unit, len(lines) + number + 1, total)
    return [line for line in lines if line is not None], [line for line in sweep if line is not None]


def _tell(unit: Unit, done: int, total: int) -> None:
    """A line on stderr now and then: a unit takes minutes."""
    if done % 10 == 0:
        print(f"  {unit.config.method}, seed {unit.config.seed}: {done}/{total}", file=sys.stderr, flush=True)


def _silent(arm: str, phase: str, done: int, total: int) -> None:
    """Progress is told a unit at a time."""


def _gate(experiment: InProcessExperiment, unit: Unit, case: str) -> Candidate:
    """The verdict on the reference with `case` planted in it."""
    spec = ArmSpec(case, unit.config, unit.carrier, case)
    try:
        candidate = experiment.gate_arm(spec, Exactness.ROUNDING)
    except ArmFailed as error:
        return Candidate(
            None, Verdict(Level.FAILED, str(error), (Check("runs to the end", None, None, False, str(error)),)), None
        )
    candidate.arm.__exit__(None, None, None)
    return dataclasses.replace(candidate, arm=None)


def _line(unit: Unit, reference: Evidence, case: Case, candidate: Candidate) -> dict[str, Any] | None:
    """The raw outcome of one case; None for one that does not fit the model or the device."""
    verdict = candidate.verdict
    if verdict.level is Level.NOT_RUN:
        return None
    planted = case.planted
    return {
        "kind": planted.kind, "name": planted.name, "family": planted.family, "layer": case.layer,
        "magnitude": case.magnitude, "seed": unit.config.seed, "equivalent": equivalent(reference, candidate.evidence),
        "caught": not verdict.level.lossless,
        "caught_by": caught_by(verdict), "split": unit.split, "method": unit.config.method, "level": verdict.level.value,
        "reason": verdict.reason, "modelled_on": planted.modelled_on, "unit": planted.unit, "values": worst_values(verdict),
    }  # fmt: skip


def _swept(unit: Unit, case: Case, candidate: Candidate) -> dict[str, Any] | None:
    verdict = candidate.verdict
    if verdict.level is Level.NOT_RUN:
        return None
    return {
        "where": f"{case.planted.name}, {case.layer}", "method": unit.config.method, "seed": unit.config.seed,
        "scale": case.magnitude, "caught": not verdict.level.lossless, "caught_by": caught_by(verdict),
    }  # fmt: skip


def equivalent(reference: Evidence, evidence: Evidence | None) -> bool:
    """Whether a planted defect changed no bit of any loss, gradient or weight, and broke nothing structural either."""
    if evidence is None or same_bits(reference, evidence) is not None:
        return False
    return all(f["passed"] for f in evidence.findings) and evidence.update == reference.update


def caught_by(verdict: Verdict) -> list[str]:
    """The names of the checks that failed, each once, in the gate's order."""
    if verdict.level.lossless:
        return []
    return list(dict.fromkeys(check.name for check in verdict.checks if not check.passed))


def worst_values(verdict: Verdict) -> dict[str, float]:
    """Of every check with a limit, the largest value over states."""
    worst: dict[str, float] = {}
    for check in verdict.checks:
        if check.value is not None and check.limit:
            before = worst.get(check.name)
            if before is None or not (math.isnan(before) or check.value <= before):
                worst[check.name] = check.value
    return worst
