"""Gates any number of arms against one reference, whose repeat, oracle and noise floor are made once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from safetensors.torch import load_file

from abtest import gate
from abtest.arm import Arm, ArmSpec
from abtest.gate import Evidence
from abtest.gradients import Comparison, Distances, compare
from abtest.verdict import Level, Verdict
from kernels.contract import Exactness
from loop.config import Config

OnProgress = Callable[[str, str, int, int], None]  # arm, phase, done, total
STATES = ("at the start", "after training")


@dataclass(frozen=True)
class GateConfig:
    """How much evidence the gate gathers. None of these is a tolerance."""

    steps: int = 30  # of the free run
    replicas: int = 8  # kicked references behind the noise floor
    probes: int = 10  # batches on which gradients are compared, at each of two states


@dataclass
class Candidate:
    """An arm that went through the gate. `arm` still runs, for timing; `evidence` is None when it did not get that far."""

    arm: Arm
    verdict: Verdict
    evidence: Evidence | None


class Experiment:
    """Use as a context manager. `prepare()` first, then `gate_arm` for every arm.

    folder: scratch space for gradients and weights. environment: of the arms' processes. on_progress(arm, phase, done,
    total) is called after every step.
    """

    def __init__(
        self, config: Config, settings: GateConfig, folder: Path, environment: dict[str, str], on_progress: OnProgress
    ) -> None:
        self.config, self.settings = config, settings
        self.folder, self.environment, self.on_progress = folder, environment, on_progress
        self.spare: Arm | None = None
        self.repeat_arm: Arm | None = None
        self.reference_arm = self._arm(ArmSpec("stock", config))
        self.trained = str(folder / "trained.safetensors")

    def __enter__(self) -> Experiment:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for arm in (self.reference_arm, self.repeat_arm, self.spare):
            if arm is not None:
                arm.__exit__(kind, error, trace)

    def end_repeat(self) -> None:
        """Ends the reference's second process once it has been timed."""
        self.repeat_arm.__exit__(None, None, None)
        self.repeat_arm = None

    def _arm(self, spec: ArmSpec) -> Arm:
        """An arm's process, and one more for the arm after it: importing takes as long as gating a small model."""
        arm = self.spare or Arm(spec, self.folder, self.environment)
        self.spare = Arm(ArmSpec(f"after {spec.name}", self.config), self.folder, self.environment)
        arm.spec = spec
        return arm

    def _step(self, arm: str, phase: str) -> Callable[[int, int], None]:
        return lambda done, total: self.on_progress(arm, phase, done, total)

    def prepare(self) -> None:
        """Runs the reference, its oracle, its repeat and its kicked replicas."""
        oracle_folders = {state: self.folder / f"oracle-{index}" for index, state in enumerate(STATES)}
        self.oracle_folders = oracle_folders
        for folder in oracle_folders.values():
            folder.mkdir()
        build = self.reference_arm.build()
        with self._arm(ArmSpec("oracle", self.config, exact=True)) as oracle:
            oracle.build()
            packing = {STATES[0]: self._oracle(oracle, STATES[0], None)}
            gradients = {STATES[0]: self._gradients(self.reference_arm, STATES[0])}
            run = self._free_run(self.reference_arm, save_state=self.trained)
            packing[STATES[1]] = self._oracle(oracle, STATES[1], self.trained)
        gradients[STATES[1]] = self._gradients(self.reference_arm, STATES[1])
        gradients = {state: answer | packing[state] for state, answer in gradients.items()}
        self.reference = Evidence(build, run, gradients)
        self.replicas, self.sigma = [], gate.noise_floor(run["loss"], [])
        self.repeat_arm = self._arm(ArmSpec("stock again", self.config))
        self.repeat = Evidence(self.repeat_arm.build(), self._free_run(self.repeat_arm))
        for seed in range(self.settings.replicas):
            kicked = self._free_run(self.repeat_arm, phase=f"noise floor {seed + 1}", kick_seed=seed)
            self.replicas.append(kicked["loss"])
        self.sigma = gate.noise_floor(run["loss"], self.replicas)

    def _oracle(self, oracle: Arm, state: str, weights: str | None) -> dict:
        folder = str(self.oracle_folders[state])
        return oracle.call("oracle", self._step("oracle", state), count=self.settings.probes, folder=folder, state=weights)

    def _gradients(self, arm: Arm, state: str) -> dict:
        name = arm.spec.name
        rows = str(self.folder / f"rows-{name}-{STATES.index(state)}.safetensors")
        weights = self.trained if state == STATES[1] else None
        answer = arm.call(
            "gradients", self._step(name, f"gradients {state}"), count=self.settings.probes,
            folder=str(self.oracle_folders[state]), rows=rows, state=weights,
        )  # fmt: skip
        return answer | {"rows": rows}

    def _free_run(self, arm: Arm, phase: str = "training", **arguments) -> dict:
        return arm.call("free_run", self._step(arm.spec.name, phase), steps=self.settings.steps, **arguments)

    def repeat_verdict(self) -> Verdict:
        """The reference against itself in a second process; anything but BITWISE makes every comparison worthless."""
        bare = Evidence(self.reference.build, self.reference.free_run)
        return gate.judge(Exactness.BITWISE, bare, None, self.repeat, (), self.sigma, {})

    def gate_arm(self, spec: ArmSpec, claim: Exactness) -> Candidate:
        """Builds and runs an arm in a fresh process and judges it. The caller ends the arm. Raises ArmFailed."""
        with ExitStack() as stack:
            arm = stack.enter_context(self._arm(spec))
            build = arm.build()
            evidence = None if build["refused"] else self._evidence(arm, build)
            stack.pop_all()  # it goes on living, for timing
        if evidence is None:
            named = len(spec.optimizations) > 1
            reason = "; ".join(f"{name}: {why}" if named else why for name, why in build["refused"].items())
            return Candidate(arm, Verdict(Level.NOT_RUN, reason), None)
        return Candidate(arm, self._judge(claim, evidence, spec.optimizations), evidence)

    def _evidence(self, arm: Arm, build: dict) -> Evidence:
        gradients = {STATES[0]: self._gradients(arm, STATES[0])}
        run = self._free_run(arm)
        gradients[STATES[1]] = self._gradients(arm, STATES[1])
        return Evidence(build, run, gradients)

    def _judge(self, claim: Exactness, evidence: Evidence, wanted: Sequence[str]) -> Verdict:
        elements = self.reference.build["elements"]
        compared: dict[str, Comparison] = {}
        for state in STATES:
            if not evidence.gradients[state]["problems"]:
                sides = (_distances(self.reference.gradients[state]), _distances(evidence.gradients[state]))
                compared[state] = compare(*sides, elements)
        return gate.judge(claim, self.reference, self.repeat, evidence, wanted, self.sigma, compared)


def _distances(answer: dict) -> Distances:
    rows = load_file(answer["rows"])
    return Distances(answer["error"], answer["norm"], answer["dot"], rows, answer["elements"], answer["problems"])
