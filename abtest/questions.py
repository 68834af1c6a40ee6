"""What an experiment asks of its arms: training, evidence for the gate's checks, the tripwire, traces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from abtest import states
from abtest.arm import Arm
from abtest.census import changes
from abtest.evidence import Evidence
from abtest.tripwire import read_tripwire

TRIPWIRE_PROBES = 3
STRUCTURE_PROBES = (0, 1, 2)  # a real pack, a tricky one, two rows


class Questions:
    """Questions of an `Experiment`, which holds `settings`, `folder`, `states`, `weights`, `resync`, `crowded`, `truths`,
    `reference_arm`, `on_progress` and what an arm beside the reference has to wait for, and knows `_step`."""

    def _train(self) -> dict:
        """The reference's free run, which leaves its weights at three states."""
        _, slow, late, _ = self.states
        steps = self.settings.steps
        at = {str(steps // 3): (slow, self.weights[slow]), str(steps - 1): (late, self.weights[late])}
        step = self._step("stock", "training")
        return self.reference_arm.call("free_run", step, steps=steps, states_to=at, resync_to=self.resync)

    def _free_run(self, arm: Arm, phase: str = "training", resync: dict[str, str] | None = None, **arguments: Any) -> dict:
        step = self._step(arm.spec.name, phase)
        resync = self.resync if resync is None else resync
        return arm.call("free_run", step, steps=self.settings.steps, resync=resync, **arguments)

    def _evidence(self, arm: Arm, build: dict, run: dict, candidate: bool) -> Evidence:
        """All but the tripwire, and but for the reference's gradients, which its repeat is asked for. What needs no oracle
        comes first, while that one is at work."""
        slow = self.truths.at(self.states[1])
        repeats = self.settings.repeats if candidate else 3
        step = self._step(arm.spec.name, "structure")
        findings = arm.call("structure", step, **slow, indexes=list(STRUCTURE_PROBES), repeats=repeats)["findings"]
        work = arm.call("work", **slow, index=1)
        update = arm.call("update", **slow, alone=self.crowded)
        findings += update.pop("findings")
        gradients = {state: self._gradients(arm, state) for state in self.states} if candidate else {}
        return Evidence(build, run, gradients, findings, update, work, None, arm.call("autotuned"))

    def _gradients(self, arm: Arm, state: str) -> dict:
        if state == states.OVERFIT:
            self.memorised_by_heart.wait()
        for index in range(self.settings.probes):
            arm.call("gradients", **self.truths.at(state), index=index, truth=self.truths.get(state, index))
            self.on_progress(arm.spec.name, f"gradients, {state}", index + 1, self.settings.probes)
        return arm.call("distances", state=state, rows=self._rows(arm, state))

    def _rows(self, arm: Arm, state: str) -> str:
        return str(self.folder / f"rows-{arm.spec.name.replace('/', '-')}-{self.states.index(state)}.safetensors")

    def _tripwire(self, arm: Arm, work: dict) -> dict[str, Any]:
        """Bends the arm's own parts, and says whether a gate over those gradients turns red."""
        state = self.states[1]
        truths = {str(index): self.truths.get(state, index) for index in range(min(TRIPWIRE_PROBES, self.settings.probes))}
        own = [name for name in changes(self.work_known.result(), work).new_names if not name.startswith(("aten::", "prim"))]
        answer = arm.call(
            "tripwire", **self.truths.at(state), truths=truths, new_operators=own, rows=self._rows(arm, state) + ".bent"
        )
        return read_tripwire(state, self.gradients_known[state].result(), answer, self.reference_arm.built["elements"])

    def _trace(self, arm: Arm) -> Path:
        """Where the arm's trace is, once it has been asked for one."""
        path = self.folder / f"trace-{arm.spec.name}.safetensors"
        if not path.exists():
            arm.call("trace", **self.truths.at(self.states[2]), index=0, path=str(path))
        return path
