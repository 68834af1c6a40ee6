"""`python -m bench.run`: gates every optimization against stock, times what passed, and writes the report.

The last line on stdout is one JSON document with every arm's verdict and numbers; everything else goes to stderr.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abtest.arm import ArmFailed, ArmSpec
from abtest.command import check_gate, default_for, gate_config
from abtest.environment import describe
from abtest.experiment import Candidate, Experiment
from abtest.progress import GateProgress
from abtest.settings import GateConfig
from abtest.verdict import Level, Verdict
from bench.ceilings import Ceilings, measure_ceilings
from bench.clock import TimingConfig, time_arms, time_equals
from bench.micro import run_micro
from bench.own_stock import changed, note
from bench.plan import ArmPlan, arm_units, combination, plan_arms, planned_units
from bench.records import Record, append, read
from bench.report import render, summary_json
from kernels import registry
from kernels.contract import Exactness
from loop.cli import guarded, parse
from loop.config import Config
from loop.errors import UserError
from loop.model import resolve_device
from loop.recipe import load_recipe, to_plain

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Command(Config):
    """Flags of `python -m bench.run`."""

    arms: tuple[str, ...] = ("all",)  # optimizations and peers by name; "all" of them; "negative" for negative_results/
    combine: bool = True  # one more arm with everything on that passed and may be timed
    micro: bool = True  # every lossless optimization's op on its own, too
    gate: GateConfig = field(default_factory=GateConfig)
    timing: TimingConfig = field(default_factory=TimingConfig)
    reports: Path = ROOT / "reports"


class Bench:
    """One run: the experiment, what is the same in all its records, and the records so far."""

    def __init__(
        self, command: Command, progress: GateProgress, experiment: Experiment, ceilings: Ceilings, facts: dict[str, Any],
        own_experiment: Callable[[ArmPlan], Experiment] | None = None,
    ) -> None:  # fmt: skip
        self.command, self.progress, self.experiment, self.facts = command, progress, experiment, facts
        self.ceilings, self.matmul_rate = ceilings, ceilings.matmul_flops_per_s
        self.path = command.reports / "data" / facts["environment"]["device_slug"] / "records.jsonl"
        self.records: list[Record] = []
        self.config = gate_config(command, command.gate)
        self.own_experiment = own_experiment  # for an arm with a stock of its own

    def keep(
        self, plan: ArmPlan, verdict: Verdict, losses=(), perf=None, untimed=None, paths=None,
        beside: Experiment | None = None, **extra: Any,
    ) -> None:  # fmt: skip
        """Appends one record to the file, and says how the arm ended. beside: the experiment that gated it, if not the
        run's."""
        experiment = beside or self.experiment
        facts = dict(self.facts, environment=dict(self.facts["environment"], paths=paths or {}))
        if plan.own_stock:
            facts["recipe"] = facts["recipe"] | changed(plan.config, self.config)
            extra.setdefault("notes", (note(plan.config, self.config, None),))
        if beside is not None:
            facts["data"] = beside.reference.build["data"]
        compared = beside is not None or not plan.own_stock  # its own stock may not have come that far
        reference = tuple(experiment.reference.losses) if compared else ()
        record = Record(
            arm=plan.name, role=plan.role, optimizations=plan.optimizations, verdict=verdict, summary=plan.summary,
            exactness=plan.claim.value, why_exact=plan.why_exact, finished_at=_now(), losses=tuple(losses),
            reference_losses=reference, noise_sigma=tuple(experiment.sigma) if compared else (), perf=perf, untimed=untimed,
            **facts, **extra,
        )  # fmt: skip
        append(self.path, record)
        self.records.append(record)
        speed = f", {perf.ratio:.2f}x [{perf.ratio_low:.2f}, {perf.ratio_high:.2f}]" if perf else ""
        self.progress.say(f"{plan.name}: {verdict.level.value}{speed}: {verdict.reason}")

    def reference(self) -> None:
        """The stock arm: everything it is the reference for, its repeat, its speed. Raises UserError if it can't run."""
        try:
            self._reference()
        except ArmFailed as error:
            self.progress.say(error.output)
            raise UserError(f"without its reference nothing can be compared: {error}") from error

    def _reference(self) -> None:
        self.experiment.prepare()
        evidence = self.experiment.reference
        self.facts["data"] = evidence.build["data"]
        plan = ArmPlan(
            "stock", "reference", (), self.command, Exactness.BITWISE,
            "transformers' own layers in pure PyTorch with PEFT's adapters, documents kept apart", "it is the reference",
        )  # fmt: skip
        verdict = self.experiment.repeat_verdict()
        perf, again = None, None
        if verdict.level.lossless:
            stock, repeat = self.experiment.reference_arm, self.experiment.repeat_arm
            perf, again = time_equals(stock, repeat, self.command.timing, self.matmul_rate, self.progress)
        self.experiment.end_repeat()
        paths = evidence.build["paths"]
        self.keep(plan, verdict, evidence.losses, perf, paths=paths)
        repeated = dataclasses.replace(
            plan, name="stock_again", role="repeat", summary="stock in a second process: does it repeat itself, and how far "
            "from 1 does the speed ratio of equal arms come out",
        )  # fmt: skip
        self.keep(repeated, verdict, self.experiment.repeat.losses, again, paths=paths)

    def arm(self, plan: ArmPlan) -> None:
        """Gates one arm, times it if it passed and may be timed, and keeps its record."""
        if plan.missing is not None:
            self.keep(plan, Verdict(Level.NOT_RUN, plan.missing))
            self._skip_rest(plan, 0)
            return
        done = self.progress.done
        if plan.own_stock:
            self._arm_beside_own_stock(plan)
        else:
            self._arm_beside(plan, None)
        self._skip_rest(plan, self.progress.done - done)

    def _arm_beside_own_stock(self, plan: ArmPlan) -> None:
        """The arm, and stock of its own recipe, which runs for it alone with an oracle and a noise floor of its own."""
        with self.own_experiment(plan) as experiment:
            try:
                experiment.prepare(timed=False)
            except ArmFailed as error:
                self.progress.say(error.output)
                self.keep(plan, Verdict(Level.INVALID, f"stock of its own recipe: {error}"))
            else:
                self._arm_beside(plan, experiment)

    def _arm_beside(self, plan: ArmPlan, beside: Experiment | None) -> None:
        experiment = beside or self.experiment
        try:
            candidate = experiment.gate_arm(ArmSpec(plan.name, plan.config, plan.optimizations), plan.claim)
        except ArmFailed as error:
            self.progress.say(error.output)
            self.keep(plan, Verdict(Level.FAILED, str(error)), beside=beside)
        else:
            with candidate.arm:
                self._keep_candidate(plan, candidate, beside)

    def _keep_candidate(self, plan: ArmPlan, candidate: Candidate, beside: Experiment | None) -> None:
        own, perf, untimed = None, None, None
        if candidate.verdict.level.lossless:
            untimed = plan.untimed
            if untimed is None:
                stock = (beside or self.experiment).reference_arm
                time = time_arms if beside is None else time_equals
                try:
                    perf = time(stock, candidate.arm, self.command.timing, self.matmul_rate, self.progress)
                except ArmFailed as error:  # the gate's verdict stands
                    self.progress.say(error.output)
                    untimed = f"timing broke off: {error}"
        if beside is not None and perf is not None:
            own, perf = perf
        evidence = candidate.evidence
        self.keep(
            plan, candidate.verdict, evidence.losses if evidence else (), perf, untimed,
            paths=evidence.build["paths"] if evidence else None,
            micro=self._micro(plan) if candidate.verdict.level.lossless else None,
            **({"beside": beside, "notes": (note(plan.config, self.config, own),)} if beside is not None else {}),
        )  # fmt: skip

    def _micro(self, plan: ArmPlan) -> dict[str, Any] | None:
        """The microbenchmark of an optimization that has an op, timed only if the op passes its own check."""
        optimization = registry.discover().get(plan.name)
        if not self.command.micro or optimization is None or optimization.op is None:
            return None
        device, _ = resolve_device(self.command)
        try:
            return run_micro(optimization, device, ceilings=self.ceilings)
        except RuntimeError as error:  # out of memory, say; the arm's own verdict and time stand
            self.progress.say(f"{plan.name}: its microbenchmark broke off: {str(error).splitlines()[0]}")
            return None

    def _skip_rest(self, plan: ArmPlan, done: int) -> None:
        self.progress.skip(arm_units(self.command.gate, self.command.timing.blocks, plan.own_stock) - done)

    def passed(self, arms: list[ArmPlan]) -> list[str]:
        """Those of `arms` that are optimizations, lossless beside the run's stock, and timed."""
        fast = {r.arm for r in self.records if r.role == "optimization" and r.verdict.level.lossless and r.perf is not None}
        return [plan.name for plan in arms if plan.name in fast and not plan.own_stock]


def main(argv: list[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = parse(_default(arguments), "python -m bench.run", "Gates and times every optimization.", arguments)
    device, dtype = resolve_device(command)
    _check(command)
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, here and in the arms
    arms = plan_arms(command.arms, gate_config(command, command.gate), device)
    ceilings = measure_ceilings(device)
    facts = _facts(command, describe(device), ceilings, str(dtype).removeprefix("torch."))
    _check_records(command.reports, facts["environment"]["device_slug"])
    with (
        tempfile.TemporaryDirectory(prefix="isoloss-") as scratch,
        GateProgress(planned_units(command.gate, command.timing.blocks, arms, command.combine)) as progress,
        Experiment(
            gate_config(command, command.gate), command.gate, Path(scratch), dict(os.environ), progress
        ) as experiment,
    ):

        def own_experiment(plan: ArmPlan) -> Experiment:
            folder = Path(scratch) / plan.name
            folder.mkdir()
            return Experiment(plan.config, command.gate, folder, dict(os.environ), progress)

        bench = Bench(command, progress, experiment, ceilings, facts, own_experiment)
        bench.reference()
        for plan in arms:
            bench.arm(plan)
        together = combination(bench.passed(arms), gate_config(command, command.gate)) if command.combine else None
        if together is not None:
            bench.arm(together)
    render(command.reports / "data", command.reports)
    print(summary_json(bench.records))
    return 0


def _default(arguments: list[str]) -> Command:
    """The gate's recipe for the device, with how much to time added."""
    command = default_for(arguments, Command())
    return load_recipe(Path(__file__).parent / "recipes" / f"{command.device}.toml", command)


def _check(command: Command) -> None:
    check_gate(command)
    for name, value, least in (
        ("timing.blocks", command.timing.blocks, 2), ("timing.micro_batches", command.timing.micro_batches, 1),
    ):  # fmt: skip
        if value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}")


def _check_records(reports: Path, device_slug: str) -> None:
    """What is the user's to mend is to mend now, not after the measurements: a damaged line, a path that can't be."""
    records = reports / "data" / device_slug / "records.jsonl"
    try:
        records.parent.mkdir(parents=True, exist_ok=True)
        if records.exists():
            read(records)
    except OSError as error:
        raise UserError(
            f"--reports {reports}: {error.filename}: {error.strerror}; a folder to write to is expected"
        ) from error


def _facts(command: Command, environment: dict[str, Any], ceilings: Ceilings, dtype: str) -> dict[str, Any]:
    """What all records of this run share."""
    environment |= {
        "matmul_flops_per_s": ceilings.matmul_flops_per_s,
        "matmul_dtype": ceilings.matmul_dtype,
        "copy_bytes_per_s": ceilings.copy_bytes_per_s,
    }
    recipe = to_plain(command) | {"dtype": dtype, "steps": command.gate.steps}
    for machine_path in ("reports", "output"):
        recipe.pop(machine_path, None)
    recipe["gate"].pop("oracle_cache", None)
    sha = (environment["git_sha"] or "nogit")[:7]
    return {
        "run_id": f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{sha}",
        "environment": environment, "recipe": recipe, "data": {},
        "command": shlex.join(["python", "-m", "bench.run", *sys.argv[1:]]),
    }  # fmt: skip


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


if __name__ == "__main__":
    guarded(main)
