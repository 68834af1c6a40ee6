"""The detection matrix: which check caught how many cases of which planted defect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from abtest import jsonl
from abtest.figures import ALARM, label, png
from abtest.report.checks import part_of, rank
from abtest.report.sensitivity_records import Sensitivity, SensitivityLine

WHITE_TO_BLUE = ("#ffffff", "#c9dcf0", "#0b2a4a")


def defects(lines: Sequence[SensitivityLine]) -> list[SensitivityLine]:
    """Planted defects that change something: an equivalent one can't be caught, and counts nowhere."""
    return [line for line in lines if line.kind == "mutant" and not line.equivalent]


def beyond_preflight(line: SensitivityLine) -> bool:
    """Whether checks 2 to 5 alone would have caught it."""
    return any(part_of(check) > 1 for check in line.caught_by)


@dataclass(frozen=True)
class Matrix:
    """codes: a short name for each check that caught a defect, in the gate's order: "2.3" is the third of part 2.

    by_family, by_name: cases that change something, by family, and by mutant in the order of families.
    """

    codes: dict[str, str]
    by_family: dict[str, list[SensitivityLine]]
    by_name: dict[str, list[SensitivityLine]]

    @classmethod
    def of(cls, lines: Sequence[SensitivityLine]) -> Matrix:
        found = sorted(defects(lines), key=lambda line: (line.family, line.name))
        counts: dict[int, int] = {}
        codes = {}
        for check in sorted({check for line in found for check in line.caught_by}, key=rank):
            part = part_of(check)
            counts[part] = counts.get(part, 0) + 1
            codes[check] = f"{part}.{counts[part]}"
        return cls(codes, _grouped(found, lambda line: line.family), _grouped(found, lambda line: line.name))

    def caught(self, lines: Sequence[SensitivityLine]) -> dict[str, int]:
        """How many of these cases each check caught, in the order of `codes`, zeros left out."""
        counts = {check: sum(check in line.caught_by for line in lines) for check in self.codes}
        return {check: count for check, count in counts.items() if count}


def _grouped(lines: Sequence[SensitivityLine], key: Callable[[SensitivityLine], str]) -> dict[str, list[SensitivityLine]]:
    groups: dict[str, list[SensitivityLine]] = {}
    for line in lines:
        groups.setdefault(key(line), []).append(line)
    return groups


def heat_map(sensitivity: Sensitivity) -> bytes:
    """A row a mutant, a column a check, the darker the larger a share of its cases the check caught, as a PNG."""
    matrix = Matrix.of(sensitivity.lines)
    names = list(matrix.by_name)
    share = np.zeros((len(names), len(matrix.codes)))
    for row, lines in enumerate(matrix.by_name.values()):
        for column, check in enumerate(matrix.codes):
            share[row, column] = sum(check in line.caught_by for line in lines) / len(lines)
    missed = [not all(line.caught for line in lines) for lines in matrix.by_name.values()]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        colors = LinearSegmentedColormap.from_list("caught", WHITE_TO_BLUE)
        axes.pcolormesh(share, cmap=colors, vmin=0, vmax=1, edgecolors="#e8eaed", linewidth=0.4)
        axes.invert_yaxis()
        axes.set_xticks(
            np.arange(len(matrix.codes)) + 0.5, [f"{code}  {label(check, 62)}" for check, code in matrix.codes.items()],
            rotation=90, fontsize=7,
        )  # fmt: skip
        axes.set_yticks(np.arange(len(names)) + 0.5, [label(name, 40) for name in names], fontsize=7)
        for tick, survives in zip(axes.get_yticklabels(), missed, strict=True):
            tick.set_color(ALARM if survives else "#30343b")
        axes.tick_params(length=0, top=True, bottom=False, labeltop=True, labelbottom=False)
        _families(axes, matrix)
        device = label(sensitivity.device, 60)
        axes.set_xlabel(f"{device}: share of each defect's cases that a check caught; red: a case survives", fontsize=8)

    size = (3.6 + 0.21 * max(len(matrix.codes), 8), 3.6 + 0.135 * len(names))
    return png(draw, size, ["matrix", sensitivity.device, *map(jsonl.dumps, sensitivity.lines)])


def _families(axes, matrix: Matrix) -> None:
    """A line between families, and their names at the right."""
    end = 0
    for family, lines in matrix.by_family.items():
        start, end = end, end + len({line.name for line in lines})
        axes.axhline(end, color="#8a8f98", lw=0.8)
        middle = (start + end) / 2
        place = axes.get_yaxis_transform()
        axes.text(1.01, middle, label(family, 28), va="center", fontsize=7, color="#555b66", transform=place)
