"""Noise replicas: kicked references, from whose losses the gate takes how far rounding alone moves a run."""

from __future__ import annotations

from contextlib import suppress

from abtest.arm import Arm, ArmFailed, ArmSpec
from loop.model import resolve_device


class Replicas:
    """The replicas of an `Experiment`, which holds `config`, `base`, `settings`, `resync`, `crowded`, `hungry`, the events
    that tell who is through, and of replicas `seeds`, `kicked`, `two` and `large`; and knows `_arm` and `_step`."""

    def _more_replicas(self) -> None:
        """A second process for them, once there is memory for it and if it is worth its start: one that launches small
        kernels does not fill a GPU. Beside one that recomputes nothing that is when repeat and candidate are through. What
        it had begun when it ends for want of memory is left to the first."""
        self.exact_through.wait()
        self.reference_through.wait()
        if self.large and self._room():
            self.repeat_through.wait()
            self.first_through.wait()
        if len(self.seeds) > 1:
            self.two = True
            with suppress(ArmFailed):
                self._replicas("more replicas")

    def _replicas(self, name: str = "replicas") -> None:
        """Kicked references, in a process of their own, until none is left. Recomputing takes a quarter of their time and
        spares memory: where oracle and reference have left theirs, the first process recomputes nothing."""
        cpu, first = resolve_device(self.config)[0].type == "cpu", name == "replicas"
        with self._arm(ArmSpec(name, self.config, self.base)) as arm:
            arm.build()
            arm.call("remember")
            self.trained.wait()
            while self.seeds:
                try:
                    seed = self.seeds.popleft()
                except IndexError:  # the other process was faster
                    return
                try:
                    self.kicked[seed] = self._replica(arm, seed, kept=cpu or (first and self._room()))
                except ArmFailed:
                    self.seeds.append(seed)
                    raise

    def _room(self) -> bool:
        """Whether those who take most are through, and the others take no more than stock does, or are through as well if
        there are two processes for replicas."""
        others = (self.repeat_through, self.first_through) if self.two else ()
        through = all(event.is_set() for event in (self.exact_through, self.reference_through, *others))
        return through and not (self.crowded or self.hungry)

    def _replica(self, arm: Arm, seed: int, kept: bool) -> list[float]:
        step = self._step(arm.spec.name, f"noise floor {seed + 1}")
        answer = arm.call("replica", step, steps=self.settings.steps, resync=self.resync, seed=seed, kept=kept)
        self.large = self.large or answer["roomy"]
        return answer["loss"]
