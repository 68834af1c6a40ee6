"""Measures a run's arms: the reference first, then each arm through the gate, against the clock, and into the records."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from abtest.arm import Arm, ArmFailed, ArmSpec
from abtest.command import gate_config
from abtest.experiment import UNCHECKPOINTED, Candidate, Experiment
from abtest.mps import behind_others
from abtest.progress import GateProgress
from abtest.verdict import Level, Verdict
from bench.ceilings import Ceilings
from bench.clock import race, time_arms, time_equals
from bench.command import Command
from bench.ledger import Ledger
from bench.micro import run_micro
from bench.own_stock import changed, note
from bench.peers import facts as facts_of_peer
from bench.plan import ArmPlan, arm_units
from bench.records import Perf, Race, Record, append, may_hold_time
from kernels import registry
from kernels.contract import Exactness
from loop.errors import UserError
from loop.model import resolve_device


class Bench:
    """One command: the experiment, and what is the same in all its records."""

    def __init__(
        self, command: Command, progress: GateProgress, experiment: Experiment, ceilings: Ceilings, facts: dict[str, Any],
        own_experiment: Callable[[ArmPlan], Experiment] | None = None,
    ) -> None:  # fmt: skip
        self.command, self.progress, self.experiment, self.facts = command, progress, experiment, facts
        self.ceilings, self.matmul_rate = ceilings, ceilings.matmul_flops_per_s
        self.path = command.reports / "data" / facts["environment"]["device_slug"] / "records.jsonl"
        self.ledger = Ledger(self.path, facts["run_id"], facts["recipe"])
        self.config = gate_config(command, command.gate)
        self.own_experiment = own_experiment  # for an arm with a stock of its own
        self.head_start: dict[str, float] = {}  # seconds that an arm was at work beside others

    def keep(
        self, plan: ArmPlan, verdict: Verdict, losses=(), perf=None, untimed=None, paths=None,
        beside: Experiment | None = None, peer: dict[str, Any] | None = None, **extra: Any,
    ) -> None:  # fmt: skip
        """Appends one record to the file, and says how the arm ended. beside: the experiment that gated it, if not the
        run's. peer: what the record says of a peer."""
        experiment = beside or self.experiment
        facts = dict(self.facts, environment=dict(self.facts["environment"], paths=paths or {}))
        if plan.role == "peer":
            facts["environment"]["peer"] = peer or facts_of_peer(dict(plan.versions), {}, {})
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
        speed = f", {perf.ratio:.2f}x [{perf.ratio_low:.2f}, {perf.ratio_high:.2f}]" if perf else ""
        if record.race is not None:
            speed += f", {record.race.arm} is {record.race.ratio:.2f}x as fast"
        self.progress.say(f"{plan.name}: {verdict.level.value}{speed}: {verdict.reason}")

    def reference(self, first: ArmPlan | None = None) -> None:
        """The stock arm: everything it is the reference for, its repeat, its speed. Raises UserError if it can't run.

        first: the arm that is gated first, which works beside the reference if it may. It has answered its last command when
        the reference is timed, and an arm launches nothing but what it is asked for.
        """
        try:
            self._reference(self._spec(first) if first is not None and goes_beside(first, self.command) else None)
        except ArmFailed as error:
            self.progress.say(error.output)
            raise UserError(f"without its reference nothing can be compared: {error}") from error

    def _reference(self, first: ArmSpec | None) -> None:
        self.experiment.prepare(first=first)
        self._settle(first)
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
            self.experiment.waiting.quiet()
            perf, again = time_equals(stock, repeat, self.command.timing, self.matmul_rate, self.progress)
        self.experiment.end_repeat()
        paths = evidence.build["paths"]
        self.keep(plan, verdict, evidence.losses, perf, paths=paths)
        repeated = dataclasses.replace(
            plan, name="stock_again", role="repeat", summary="stock in a second process: does it repeat itself, and how far "
            "from 1 does the speed ratio of equal arms come out",
        )  # fmt: skip
        self.keep(repeated, verdict, self.experiment.repeat.losses, again, paths=paths)

    def begin_ahead(self, plans: Iterable[ArmPlan]) -> None:
        """Has peers that can run here get ready for their turn, while other arms are gated; nothing is timed meanwhile."""
        for plan in plans:
            if plan.role == "peer" and plan.missing is None and self.command.gate.parallel > 1:
                self.experiment.begin_ahead(self._spec(plan))

    def gather(self, batch: Sequence[ArmPlan]) -> None:
        """What arms of one batch report, asked of all of them at the same time; each is then judged and timed in its turn,
        while the others wait for their next command."""
        specs = [self._spec(plan) for plan in batch]
        if len(specs) > 1:
            self.experiment.collect(specs)
            for spec in specs:
                self._settle(spec)

    def _settle(self, first: ArmSpec | None) -> None:
        """An arm that ended beside the others is tried again alone: they may have left it too little memory."""
        collected = self.experiment.early.get(first) if first is not None else None
        if collected is not None and collected.error is not None:
            self.progress.say(f"{first.name}: {collected.error}; once more, alone")
            self.experiment.early.pop(first).arm.__exit__(None, None, None)
        elif collected is not None and collected.evidence is not None:
            self.head_start[first.name] = collected.seconds

    @staticmethod
    def _spec(plan: ArmPlan) -> ArmSpec:
        return ArmSpec(plan.name, plan.config, plan.optimizations, worker=plan.worker)

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
            candidate = experiment.gate_arm(self._spec(plan), plan.claim)
        except ArmFailed as error:
            self.progress.say(error.output)
            verdict = Verdict(Level.FAILED, str(error))
            if plan.role == "peer" and error.command != "build":
                self._peer_without_gate(plan, verdict)
            else:
                self.keep(plan, verdict, beside=beside)
        else:
            with candidate.arm:
                self._keep_candidate(plan, candidate, beside)

    def _keep_candidate(self, plan: ArmPlan, candidate: Candidate, beside: Experiment | None) -> None:
        own, perf, untimed = None, None, None
        if may_hold_time(plan.role, candidate.verdict.level):
            untimed = plan.untimed
            if untimed is None:
                perf, untimed = self._time(plan, candidate.arm, beside)
        if beside is not None and perf is not None:
            own, perf = perf
        evidence = candidate.evidence
        peer = None
        if plan.role == "peer" and evidence is not None:
            peer = facts_of_peer(dict(plan.versions), evidence.build["peer"], evidence.work["kernels"])
        self.keep(
            plan, candidate.verdict, evidence.losses if evidence else (), perf, untimed,
            paths=evidence.build["paths"] if evidence else None, peer=peer, race=self._race(plan, candidate.arm, perf),
            micro=self._micro(plan) if candidate.verdict.level.lossless else None,
            **({"beside": beside, "notes": (note(plan.config, self.config, own),)} if beside is not None else {}),
        )  # fmt: skip

    def _time(self, plan: ArmPlan, arm: Arm, beside: Experiment | None) -> tuple[Any, str | None]:
        """What the clock gives, or why it gave nothing; the gate's verdict stands either way. A peer's updates are the
        loop's."""
        stock = (beside or self.experiment).reference_arm
        self.experiment.waiting.quiet()
        how = (self.command.timing, self.matmul_rate, self.progress)
        try:
            if beside is not None:
                return time_equals(stock, arm, *how), None
            return time_arms(stock, arm, *how, plan.role != "peer"), None
        except ArmFailed as error:
            self.progress.say(error.output)
            return None, f"timing broke off: {error}"

    def _race(self, plan: ArmPlan, arm: Arm, perf: Perf | None) -> Race | None:
        """A timed peer in turn with the fastest arm that passed in the run so far, which is built once more for that: kept
        from its own turn on, it would hold the memory in which the arms between are gated."""
        best = self.ledger.fastest() if plan.role == "peer" and perf is not None else None
        if best is None:
            return None
        again = ArmSpec(f"{best.arm} once more", self.config, best.optimizations)
        try:
            with (
                self.experiment.without_reference(),
                Arm(again, self.experiment.folder, behind_others(self.experiment.environment)) as other,
            ):
                other.build()
                return race(arm, other, best, self.command.timing)
        except ArmFailed as error:
            self.progress.say(f"{plan.name} beside {best.arm}: {error}")
            return None

    def _peer_without_gate(self, plan: ArmPlan, verdict: Verdict) -> None:
        """A peer whose process did not get through the gate may train all the same: it is timed in a second process, and
        the record keeps what ended the first."""
        experiment = self.experiment
        perf, untimed, took, beside = None, None, {}, None
        try:
            with Arm(self._spec(plan), experiment.folder, behind_others(experiment.environment)) as arm:
                took = arm.build().get("peer", {})
                perf, untimed = self._time(plan, arm, None)
                beside = self._race(plan, arm, perf)
        except ArmFailed as error:
            self.progress.say(error.output)
            untimed = f"its second process failed, too: {error}"
        self.keep(plan, verdict, (), perf, untimed, peer=facts_of_peer(dict(plan.versions), took, {}), race=beside)

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
        """What of the arm's planned work was not needed; `done` of it was done, and what it did beside the reference."""
        gate = self.command.gate
        before = arm_units(gate, 0) if plan.name in self.head_start else 0
        self.progress.skip(arm_units(gate, self.command.timing.blocks, plan.own_stock) - done - before)


def goes_beside(plan: ArmPlan, command: Command) -> bool:
    """Whether the arm may be gated while the reference, or another arm, is at work. Not what recomputes nothing, which keeps
    most of all, and a peer takes what memory it takes. In full fine-tuning every arm has fp32 weights and moments of its
    own; the experiment knows how many of those fit, and whether the reference has to rest meanwhile."""
    keeps_all = UNCHECKPOINTED in plan.optimizations or (
        command.gradient_checkpointing and not plan.config.gradient_checkpointing
    )
    fits = not keeps_all and plan.role != "peer"
    return command.gate.parallel > 1 and fits and plan.missing is None and not plan.own_stock


def side_by_side(command: Command) -> int:
    """How many arms are gated at the same time: their host is what the time goes to, not the device. In full fine-tuning
    two, since those that are through keep their weights and moments until each was timed."""
    most = max(command.gate.parallel // 2, 1)
    return most if command.method == "lora" else min(most, 2)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
