"""Gates any number of arms against one reference, whose repeat, oracle and noise floor are made once."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from abtest import gate, states, trace
from abtest.arm import Arm, ArmFailed, ArmSpec
from abtest.evidence import Evidence, noise_floor
from abtest.gradients import Comparison, compare
from abtest.mps import behind_others
from abtest.questions import Questions
from abtest.replicas import Replicas
from abtest.settings import GateConfig, OnProgress
from abtest.tripwire import read_distances
from abtest.truths import Truths
from abtest.verdict import Level, Verdict
from abtest.waiting import Waiting
from kernels.contract import Exactness
from loop.config import Config

RESYNC_BYTES = 8 << 30  # a larger optimizer state is not handed from arm to arm, and several fill a GPU: arms take turns
# So many times its optimizer's state an arm of that size may take while it is gated: weights, gradients, a second copy of
# either, and a head over two rows. Seen at 2B in full fine-tuning, two packs of 5376: 57 GiB beside a state of 21.
STATES_AN_ARM = 3
UNCHECKPOINTED = "keep_activations"
# A candidate with one of these takes several times the reference's memory, and replicas leave it theirs.
HUNGRY = {UNCHECKPOINTED, "cuda_graphs"}


@dataclass
class Candidate:
    """An arm that went through the gate. `arm` still runs, for timing; `evidence` is None when it did not get that far.

    compared: gradients beside the oracle's, by state. trace: where it begins to differ, if that was asked for.
    """

    arm: Arm
    verdict: Verdict
    evidence: Evidence | None
    compared: dict[str, Comparison] = field(default_factory=dict)
    trace: list[dict[str, Any]] = field(default_factory=list)


def _same_start(build: dict[str, Any], other: dict[str, Any], who: str) -> None:
    """Raises ArmFailed unless both begin with the same weights, trained and frozen: a comparison would mean nothing."""
    if (build["weights"], build["frozen"]) != (other["weights"], other["frozen"]):
        raise ArmFailed(f"{who} does not begin with the same weights as stock")


@contextmanager
def _settled(awaited: Iterable[Future]) -> Iterator[None]:
    """Whoever waits for one of them that the block ends without is told so, instead of waiting for ever."""
    try:
        yield
    finally:
        for one in awaited:
            if not one.done():
                one.set_exception(ArmFailed("the reference ended before it was through"))


def _then(event: threading.Event, task: Callable[[], Any]) -> Callable[[], Any]:
    """The task, which sets the event however it ends."""

    def told() -> Any:
        try:
            return task()
        finally:
            event.set()

    return told


@dataclass(frozen=True)
class _Collected:
    """What an arm reported, perhaps before the reference was through; `error` ended it early."""

    arm: Arm
    evidence: Evidence | None
    error: ArmFailed | None
    seconds: float


class Experiment(Questions, Replicas):
    """Use as a context manager. `prepare()` first, then `gate_arm` for every arm.

    folder: scratch space for weights and row sums. environment: of the arms' processes. on_progress(arm, phase, done,
    total) is called after every step, from several threads where arms work in parallel. base: optimizations that the
    reference itself has on; none unless it is the gate that is being measured. The oracle never has any. hurried: on a GPU
    that arms share, the reference stands before those who wait for it; not where it is timed beside them.
    """

    def __init__(
        self, config: Config, settings: GateConfig, folder: Path, environment: dict[str, str], on_progress: OnProgress,
        base: tuple[str, ...] = (), hurried: bool = False,
    ) -> None:  # fmt: skip
        self.config, self.settings, self.base = config, settings, base
        self.folder, self.environment, self.on_progress = folder, environment, on_progress
        self.states = states.names(settings.steps)
        self.weights = {state: str(folder / f"state-{index}.safetensors") for index, state in enumerate(self.states)}
        self.resync: dict[str, str] = {}
        self.crowded = False  # whether every arm's optimizer is so large that only one may be at work beside the reference
        self.abreast = settings.parallel  # candidates that may be at work at the same time; where crowded, without it
        self.hungry = False  # whether the arm that is gated beside the reference takes much memory
        self.spares: deque[Arm] = deque()
        self.waiting = Waiting()
        self.ahead = 1  # spare processes to keep
        self.repeat_arm: Arm | None = None
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, float] = {}  # seconds an arm took over a command, "stock: overfit" for example
        self.early: dict[ArmSpec, _Collected] = {}
        self.starting = threading.Lock()
        self.trained, self.memorised_by_heart, self.exact_through, self.reference_through = (
            threading.Event() for _ in range(4)
        )
        self.repeat_through, self.first_through = threading.Event(), threading.Event()
        # What an arm beside the reference has to know of it: its census, and its gradients by state.
        self.work_known: Future[dict] = Future()
        self.gradients_known: dict[str, Future[dict]] = {state: Future() for state in self.states}
        self.seeds = deque(range(settings.replicas))  # of replicas that nobody has begun
        self.kicked: dict[int, list[float]] = {}  # their losses
        self.two = False  # whether a second process for replicas has begun
        self.large = False  # whether the device is so large that one process for replicas need not recompute
        self.reference_arm = self._arm(ArmSpec("stock", config, base), ahead_of_others=hurried)
        self.truths = Truths(
            lambda: self._arm(ArmSpec("oracle", config, exact=True), ahead_of_others=True),
            settings,
            self.weights,
            on_progress,
        )

    def __enter__(self) -> Experiment:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.waiting.end()
        for spare in self.spares:
            spare.end(0)  # it may still be importing, for nobody
        own = (self.reference_arm, self.repeat_arm, self.truths.arm, *(collected.arm for collected in self.early.values()))
        left = [arm for arm in own if arm is not None]
        for arm in left:
            arm.close()  # they end side by side
        for arm in left:
            arm.__exit__(kind, error, trace)

    def end_repeat(self) -> None:
        """Ends the reference's second process once it has been timed."""
        self.repeat_arm.__exit__(None, None, None)
        self.repeat_arm = None

    @contextmanager
    def without_reference(self) -> Iterator[None]:
        """Inside, where arms take turns, the reference's memory is for others; its run is built anew afterwards."""
        if not self.crowded:
            yield
            return
        self.reference_arm.call("rest")
        try:
            yield
        finally:
            self.reference_arm.call("resume")

    def begin_ahead(self, spec: ArmSpec) -> None:
        """Starts the process of an arm whose turn comes later, which gets ready as far as it needs no GPU for that."""
        self.waiting.begin(spec, lambda spec: Arm(spec, self.folder, behind_others(self.environment)))

    def _arm(self, spec: ArmSpec, ahead_of_others: bool = False) -> Arm:
        """An arm's process, and spare ones for those after it: importing takes as long as gating a small model."""
        arm = self.waiting.take(spec)
        if arm is not None:
            arm.seconds = self.calls
            return arm
        with self.starting:
            behind = behind_others(self.environment)
            if ahead_of_others and behind != self.environment:  # a spare process stands behind
                arm = Arm(spec, self.folder, self.environment)
            else:
                arm = self.spares.popleft() if self.spares else Arm(spec, self.folder, behind)
                while len(self.spares) < self.ahead:
                    name = f"after {spec.name}, {len(self.spares) + 1}"
                    self.spares.append(Arm(ArmSpec(name, self.config), self.folder, behind))
        arm.spec, arm.seconds = spec, self.calls
        return arm

    def _step(self, arm: str, phase: str) -> Callable[[int, int], None]:
        return lambda done, total: self.on_progress(arm, phase, done, total)

    def _together(self, *tasks: Callable[[], Any], lanes: int | None = None) -> list[Any]:
        """Runs tasks that need different arms, as many at a time as settings and memory allow, or `lanes`. What failed first
        is raised: an arm that ends takes others with it, whose complaint would name the wrong one."""
        lanes = lanes or (1 if self.crowded else self.settings.parallel)
        if lanes == 1:
            return [task() for task in tasks]
        with ThreadPoolExecutor(lanes) as pool:
            futures = [pool.submit(task) for task in tasks]
            for future in as_completed(futures):
                future.result()
        return [future.result() for future in futures]

    # The reference, and all that candidates are compared with

    def prepare(self, first: ArmSpec | None = None, timed: bool = True, traced: bool = False) -> None:
        """Runs the reference, its oracle, its repeat and its kicked replicas; beside them, where arms may work in parallel,
        also the arm that will be gated first. timed: the repeat's process stays, to be timed. traced: that arm will be
        compared with the reference layer by layer, too."""
        began, self.traced = time.monotonic(), traced
        reference = self.reference_arm
        self.repeat_arm = self._arm(ArmSpec("stock again", self.config, self.base))
        build, exact, again = self._together(reference.build, self.truths.build, self.repeat_arm.build)
        _same_start(build, exact, "the oracle")
        self.crowded = build["state_bytes"] > RESYNC_BYTES
        self.abreast = self._abreast(build)
        if not self.crowded:
            self.resync = {
                str(s): str(self.folder / f"resync-{s}.safetensors") for s in states.resync_steps(self.settings.steps)
            }
        reference.call("save_weights", path=self.weights[self.states[0]])
        beside = first is not None and self.settings.parallel > 1 and not self.crowded
        repeat = _then(self.repeat_through, lambda: self._repeat(again, timed))
        tasks = [lambda: self._reference_evidence(build), self._exact, self._replicas, repeat]
        self.hungry = beside and not HUNGRY.isdisjoint(first.optimizations)
        if beside:
            tasks += [_then(self.first_through, lambda: self._collect_early(first, traced)), self._more_replicas]
        reference, _, _, gradients, *_ = self._together(*tasks)
        if self.seeds:  # the process that had begun it ended for want of memory, and the other was through by then
            self._replicas()
        self.reference = dataclasses.replace(reference, gradients=gradients)
        self.sigma = noise_floor(self.reference.losses, [self.kicked[seed] for seed in sorted(self.kicked)])
        self.seconds["prepare"] = time.monotonic() - began

    def _abreast(self, build: dict) -> int:
        """How many candidates the device holds at the same time, the reference resting where arms are large."""
        if not self.crowded:
            return self.settings.parallel
        return min(self.settings.parallel, max(1, build["device_bytes"] // (STATES_AN_ARM * build["state_bytes"])))

    def _repeat(self, build: dict, timed: bool) -> dict[str, dict]:
        """The reference's second process: the run once more, and the reference's gradients. Those take as long as all else
        that the reference is asked for, and its two processes have the same bits or nothing is compared."""
        with _settled(self.gradients_known.values()):
            self.trained.wait()  # everybody waits for the reference's run, and nobody for this one
            # Not resynced: the repeat must come to the same weights by itself.
            self.repeat = Evidence(build, self._free_run(self.repeat_arm, resync={}))
            self.exact_through.wait()  # until then memory is the oracle's
            for state, known in self.gradients_known.items():
                known.set_result(self._reference_gradients(state))
        if not timed:
            self.end_repeat()
        return {state: known.result() for state, known in self.gradients_known.items()}

    def _reference_gradients(self, state: str) -> dict:
        """The reference's gradients, and how far its packed path and the chunked rule are from the oracle at this state."""
        answer, notes = self._gradients(self.repeat_arm, state), self.truths.notes[state]
        error, where = notes["packing_error"]
        return answer | {
            "packing_error": error,
            "packing_error_name": where,
            "recurrence_error": notes.get("recurrence_error"),
        }

    def _exact(self) -> None:
        """The oracle's states as they come, and its trace; then it makes room."""
        start, *middle, overfit = self.states
        try:
            self.truths.prefetch([start])
            self.trained.wait()
            self.truths.prefetch(middle)
            self.oracle_trace = self._trace(self.truths.arm)
            self.memorised_by_heart.wait()
            self.truths.prefetch([overfit])
            self.truths.end()
        finally:
            self.exact_through.set()

    # An arm's evidence

    def _reference_evidence(self, build: dict) -> Evidence:
        """The free run and the overfit state, for which all others wait, and then what every arm reports."""
        with ExitStack() as stack:
            stack.callback(self.reference_through.set)
            stack.enter_context(_settled([self.work_known]))
            try:
                run = self._train()
                self.trained.set()
                self.memorised = self.reference_arm.call("overfit", path=self.weights[self.states[-1]])
            finally:  # whoever waits finds a file missing, and ends
                self.trained.set()
                self.memorised_by_heart.set()
            evidence = self._evidence(self.reference_arm, build, run, candidate=False)
            self.work_known.set_result(evidence.work)
            if self.traced:
                self._trace(self.reference_arm)
        return evidence

    # Verdicts

    def repeat_verdict(self) -> Verdict:
        """The reference against itself in a second process; anything but BITWISE makes every comparison worthless."""
        return gate.repeats(self.reference, self.repeat)

    def gate_arm(self, spec: ArmSpec, claim: Exactness, traced: bool = False) -> Candidate:
        """Builds and runs an arm in a fresh process, if that is not done yet, and judges it. The caller ends the arm. Raises
        ArmFailed."""
        collected = self.early.pop(spec, None)
        if collected is not None and collected.error is not None and collected.error.of_memory:
            collected.arm.__exit__(None, None, None)  # others had it then, so that says nothing of the arm
            collected = None
        collected = collected or self._collect(spec, traced)
        began, arm, evidence = time.monotonic() - collected.seconds, collected.arm, collected.evidence
        with ExitStack() as stack:
            stack.push(arm)
            if collected.error is not None:
                raise collected.error
            rows = self._compare_traces(arm) if traced and evidence is not None else []
            stack.pop_all()  # it goes on living, for timing
        self.seconds[spec.name] = time.monotonic() - began
        if evidence is None:
            named = len(spec.optimizations) > 1
            reason = "; ".join(f"{name}: {why}" if named else why for name, why in arm.built["refused"].items())
            return Candidate(arm, Verdict(Level.NOT_RUN, reason), None)
        wanted = (*spec.optimizations, *([spec.planted] if spec.planted else []))
        compared = self._compare(evidence)
        verdict = gate.judge(claim, self.reference, self.repeat, evidence, wanted, self.sigma, compared)
        return Candidate(arm, verdict, evidence, compared, rows)

    def collect(self, specs: Sequence[ArmSpec]) -> None:
        """The evidence of several arms, gathered side by side, for `gate_arm` to judge; of no more than memory allows, and
        that one collects the others. As many are expected next."""
        specs = specs[: self.abreast] if self.crowded else specs
        if len(specs) == 1:  # alone it may as well have its turn
            return
        self.ahead = max(self.ahead, len(specs))
        with self.without_reference():
            self._together(*(lambda spec=spec: self._collect_early(spec) for spec in specs), lanes=self.abreast)

    def _collect_early(self, spec: ArmSpec, traced: bool = False) -> None:
        self.early[spec] = self._collect(spec, traced)

    def _collect(self, spec: ArmSpec, traced: bool = False) -> _Collected:
        """An arm's evidence; the tripwire comes last, since it has to know what the reference did."""
        began, evidence, error = time.monotonic(), None, None
        with ExitStack() as stack:
            arm = stack.enter_context(self._arm(spec))
            try:
                build = arm.build()
                self.trained.wait()
                if not build["refused"]:
                    evidence = self._evidence(arm, build, self._free_run(arm), candidate=True)
                    evidence = dataclasses.replace(evidence, tripwire=self._tripwire(arm, evidence.work))
                    if traced:
                        self._trace(arm)
            except ArmFailed as failed:
                error = failed
            stack.pop_all()  # whoever gates the arm ends it
        return _Collected(arm, evidence, error, time.monotonic() - began)

    def _compare(self, evidence: Evidence) -> dict[str, Comparison]:
        elements = self.reference.build["elements"]
        compared: dict[str, Comparison] = {}
        for state in self.states:
            if not evidence.gradients[state]["problems"]:
                sides = (read_distances(self.reference.gradients[state]), read_distances(evidence.gradients[state]))
                compared[state] = compare(*sides, elements)
        return compared

    def _compare_traces(self, arm: Arm) -> list[dict[str, Any]]:
        return trace.compare(self._trace(self.reference_arm), self._trace(arm), self.oracle_trace)
