"""`python -m abtest.run --optimization NAME`: the full gate for one optimization, a record and a page of its own.

The last line on stdout is one JSON document with the verdict; everything else goes to stderr. Ends with 0 for a lossless
optimization, 1 for any other verdict, 2 for a mistake.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from abtest import template
from abtest.arm import Arm, ArmFailed, ArmSpec
from abtest.catalogue import find
from abtest.census import changes
from abtest.command import check_gate, command_line, default_for, gate_config, gate_recipe, planned_units
from abtest.environment import describe
from abtest.experiment import Candidate, Experiment
from abtest.mps import behind_others, environment_of_arms, joined, shared_gpu
from abtest.op_level import op_reports
from abtest.progress import GateProgress
from abtest.report import append_gate, render
from abtest.report.records import GateRecord
from abtest.settings import GateConfig
from abtest.verdict import Check, Level, Verdict
from kernels import registry
from kernels.contract import Exactness, Optimization
from loop.cli import guarded, parse
from loop.config import Config
from loop.errors import UserError
from loop.model import resolve_device

ROOT = Path(__file__).resolve().parent.parent
WRONG = (Level.FAILED.value, Level.INVALID.value)
SHORTEST_CALL = 0.5  # seconds; what took less is not listed


@dataclass(frozen=True)
class Command(Config):
    """Flags of `python -m abtest.run`."""

    optimization: tuple[str, ...] = ()  # what to gate, by name; several are gated together, as one arm
    plant: str | None = None  # a case of the catalogue to plant on top, name:layer:magnitude, to see the gate answer it
    ops: bool = True  # check each optimization's op against fp64 first, in every autotune configuration
    gate: GateConfig = field(default_factory=GateConfig)
    reports: Path = ROOT / "reports"


def main(argv: list[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = parse(default_for(arguments, Command()), "python -m abtest.run", "Gates one optimization.", arguments)
    optimizations = _checked(command)
    command = registry.with_recipes(command, command.optimization)
    device, _ = resolve_device(command)
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, here and in the arms
    _check_missing(optimizations, device)
    began = time.monotonic()
    if device.type == "cuda":
        template.ahead(environment_of_arms({}))  # it takes seconds until processes may share the GPU
    with (
        tempfile.TemporaryDirectory(prefix="isoloss-") as scratch,
        shared_gpu(device.type == "cuda" and command.gate.parallel > 1) as variables,
        GateProgress(planned_units(command.gate)) as progress,
        ThreadPoolExecutor(1) as pool,
    ):
        environment = environment_of_arms(variables)
        ops = pool.submit(_op_checks, command, device, Path(scratch), environment, progress)
        record = _gate(command, optimizations, device, Path(scratch), environment, progress, ops, began)
        shared = joined(variables)
        record = dataclasses.replace(record, environment=record.environment | {"shared_by_mps": shared})
        progress.say(f"{record.name}: {record.verdict.level.value}: {record.verdict.reason}")
    append_gate(command.reports / "data", record.environment["device_slug"], record)
    pages = render(command.reports / "data", command.reports)
    print(json.dumps({
        "name": record.name, "level": record.verdict.level.value, "reason": record.verdict.reason,
        "seconds": record.seconds,
        "failed": [check.name for check in record.verdict.checks if not check.passed],
        "pages": [str(page) for page in pages],
    }))  # fmt: skip
    return 0 if record.verdict.level.lossless else 1


def _checked(command: Command) -> list[Optimization]:
    """The optimizations that are asked for. Raises UserError for anything that can't be run."""
    check_gate(command)
    if not command.optimization and command.plant is None:
        known = ", ".join(registry.discover())
        raise UserError(f"--optimization NAME is needed; there are: {known} (or --plant CASE alone)")
    if command.plant is not None:
        find(command.plant)
    return registry.select(command.optimization)


def _check_missing(optimizations: list[Optimization], device: torch.device) -> None:
    for optimization in optimizations:
        missing = registry.unmet(optimization.needs, device)
        if missing:
            raise UserError(f"--optimization {optimization.name}: {missing}")


def _op_checks(
    command: Command, device: torch.device, scratch: Path, environment: dict[str, str], progress: GateProgress
) -> list[dict[str, Any]]:
    """`abtest.op_level.op_reports`; where processes share a GPU in one of its own, as one more of them: this one would have
    to take turns with all of them. Nobody waits for it before the end."""
    if not (command.ops and command.optimization):
        return []
    if not joined(environment):
        return _told(op_reports(registry.select(command.optimization), device), progress)
    with Arm(ArmSpec("op checks", command), scratch, behind_others(environment)) as arm:
        try:
            rows = arm.call("op_checks", optimizations=list(command.optimization), device=device.type)["rows"]
        except ArmFailed as error:
            progress.say(error.output)
            rows = [{"op": "op checks", "workload": "all", "seed": 0, "level": Level.FAILED.value, "reason": str(error)}]
    return _told(rows, progress)


def _told(rows: list[dict[str, Any]], progress: GateProgress) -> list[dict[str, Any]]:
    progress.say(f"{len(rows)} op checks, {sum(row['level'] in WRONG for row in rows)} failed")
    return rows


def _gate(
    command: Command, optimizations: list[Optimization], device: torch.device, scratch: Path, environment: dict[str, str],
    progress: GateProgress, ops: Future[list[dict[str, Any]]], began: float,
) -> GateRecord:  # fmt: skip
    config = gate_config(command, command.gate)
    claim = registry.weakest_claim(command.optimization)
    if command.plant is not None:
        claim = max(claim, Exactness.ROUNDING, key=registry.ORDER.index)
    names = (*command.optimization, *([command.plant] if command.plant else []))
    spec = ArmSpec(" + ".join(names), config, tuple(command.optimization), command.plant)
    with Experiment(config, command.gate, scratch, environment, progress, hurried=True) as experiment:
        try:
            experiment.prepare(spec, timed=False, traced=True)
        except ArmFailed as error:
            progress.say(error.output)
            raise UserError(f"without its reference nothing can be compared: {error}") from error
        try:
            candidate = experiment.gate_arm(spec, claim, traced=True)
        except ArmFailed as error:
            progress.say(error.output)
            candidate = Candidate(None, Verdict(Level.FAILED, str(error)), None)
        else:
            candidate.arm.__exit__(None, None, None)
        return _record(command, optimizations, device, experiment, candidate, ops.result(), spec.name, claim, began)


def _record(
    command: Command, optimizations: list[Optimization], device: torch.device, experiment: Experiment, candidate: Candidate,
    ops: list[dict[str, Any]], name: str, claim: Exactness, began: float,
) -> GateRecord:  # fmt: skip
    environment = describe(device)
    evidence, reference = candidate.evidence, experiment.reference
    change = changes(reference.work, evidence.work) if evidence else None
    planted = find(command.plant).planted if command.plant else None
    sha = (environment["git_sha"] or "nogit")[:7]
    return GateRecord(
        run_id=f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{sha}",
        command=command_line("abtest.run", sys.argv[1:]),
        finished_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        environment=environment | {"paths": evidence.build["paths"] if evidence else {}},
        recipe=gate_recipe(command),
        data=reference.build["data"],
        name=name,
        optimizations=tuple(command.optimization),
        planted=command.plant,
        claim=claim.value,
        summary="; ".join([o.summary for o in optimizations] + ([planted.summary] if planted else [])),
        why_exact="; ".join(o.why_exact for o in optimizations),
        verdict=_with_ops(candidate.verdict, ops),
        losses=evidence.losses if evidence else (),
        reference_losses=reference.losses,
        noise_sigma=experiment.sigma,
        trace=tuple(candidate.trace),
        census={"reference": reference.work, "candidate": evidence.work, "new": list(change.new), "gone": list(change.gone)}
        if evidence
        else {},
        op=tuple(ops),
        autotune=evidence.autotune if evidence else {},
        seconds={
            "prepare": experiment.seconds.get("prepare", 0.0), "candidate": experiment.seconds.get(name, 0.0),
            "total": time.monotonic() - began,
        } | {call: value for call, value in experiment.calls.items() if value >= SHORTEST_CALL},
        notes=_notes(experiment, evidence),
    )  # fmt: skip


def _with_ops(verdict: Verdict, ops: list[dict[str, Any]]) -> Verdict:
    """The verdict with one more check: the op level. It is what timing waits for; the level is of the whole run."""
    if not ops:
        return verdict
    wrong = [row for row in ops if row["level"] in WRONG]
    detail = f"{wrong[0]['op']} on {wrong[0]['workload']}: {wrong[0]['reason']}" if wrong else ""
    check = Check("op checks that fail", float(len(wrong)), 0.0, not wrong, detail)
    return dataclasses.replace(verdict, checks=(*verdict.checks, check))


def _notes(experiment: Experiment, evidence: Any) -> tuple[str, ...]:
    loss, steps = experiment.memorised["loss"], experiment.memorised["steps"]
    notes = [f"The overfit state took {steps} steps to a mean loss of {loss:.4f}."]
    if not experiment.resync:
        notes.append("The optimizer's state is too large to hand on: arms were not resynced to the reference.")
    if evidence is not None and evidence.tripwire is not None:
        notes.append(f"Tripwire: {evidence.tripwire['detail']}.")
    return tuple(notes)


if __name__ == "__main__":
    guarded(main)
