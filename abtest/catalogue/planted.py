"""What is planted to judge the judge: a defect that a gate must catch, or an honest rewrite that it must let pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from loop.run import Run

Kind = Literal["mutant", "benign"]
LAYERS = ("first", "last")  # of the modules that a defect fits, in the model's order
BOTH = ("lora", "full")


@dataclass(frozen=True)
class Planted:
    """A small patch of a built run, applied where an optimization would be.

    plant(run, layer, magnitude) changes the run's seams as an optimization does. layers: where it can go; ("all",) for what
    belongs to no layer. magnitudes: how strong, in the patch's own unit (`unit`); an honest rewrite has (0.0,).
    modelled_on: the real bug that it imitates, or for a rewrite where such a rewrite is used. methods: training methods in
    which it has an effect at all. eligible(run): None, or why it doesn't fit this model or device.
    """

    name: str
    family: str
    kind: Kind
    summary: str
    modelled_on: str
    plant: Callable[[Run, str, float], None]
    layers: tuple[str, ...] = LAYERS
    magnitudes: tuple[float, ...] = (0.0,)
    unit: str = ""
    methods: tuple[str, ...] = BOTH
    eligible: Callable[[Run], str | None] = lambda run: None


@dataclass(frozen=True)
class Case:
    """One planting: what, where, how strong."""

    planted: Planted
    layer: str
    magnitude: float

    @property
    def id(self) -> str:
        """A name on the command line: `scaled_lora:first:0.01`."""
        return f"{self.planted.name}:{self.layer}:{self.magnitude:g}"

    def apply(self, run: Run) -> None:
        self.planted.plant(run, self.layer, self.magnitude)


def cases(planted: Planted) -> list[Case]:
    """Every layer with every magnitude."""
    return [Case(planted, layer, magnitude) for layer in planted.layers for magnitude in planted.magnitudes]
