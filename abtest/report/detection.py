"""The detection matrix as tables: checks by families, defects by checks, and the scale error that is still seen."""

from __future__ import annotations

from collections.abc import Sequence

from abtest.markdown import NOTHING, code, number, percent, prose, table
from abtest.report.checks import part_of
from abtest.report.matrix import Matrix, beyond_preflight
from abtest.report.page import part_title
from abtest.report.sensitivity_records import SensitivityLine, SweepLine
from abtest.verdict import PARTS


def family_table(matrix: Matrix) -> str:
    """Checks by families: how many cases that change something each check caught."""
    every = [line for lines in matrix.by_family.values() for line in lines]
    groups = [*matrix.by_family.values(), every]
    rows = [
        (code, prose(check), *(_count(sum(check in line.caught_by for line in lines)) for lines in groups))
        for check, code in matrix.codes.items()
    ]
    rows.append(("", "any check of 2 to 5", *(_of(lines, beyond_preflight) for lines in groups)))
    rows.append(("", "**any check**", *(_of(lines, lambda line: line.caught) for lines in groups)))
    rows.append(("", "cases", *(str(len(lines)) for lines in groups)))
    header = ("", "check", *(prose(family) for family in matrix.by_family), "all")
    return table(header, rows, numeric=range(2, len(header)))


def _count(count: int) -> str:
    return str(count) if count else ""


def _of(lines: Sequence[SensitivityLine], caught) -> str:
    return str(sum(caught(line) for line in lines))


def part_table(matrix: Matrix) -> str:
    """What each of the gate's parts caught, and what nothing else would have caught."""
    every = [line for lines in matrix.by_family.values() for line in lines]
    rows = []
    for part in sorted({part_of(check) for check in matrix.codes}, key=lambda part: part or len(PARTS)):
        own = [line for line in every if any(part_of(check) == part for check in line.caught_by)]
        alone = [line for line in own if all(part_of(check) == part for check in line.caught_by)]
        share = percent(len(own) / len(every))
        rows.append((part_title(part), str(len(own)), share, str(len(alone))))
    return table(("part of the gate", "cases caught", "of all", "caught by nothing else"), rows, numeric=(1, 2, 3))


def mutant_table(matrix: Matrix) -> str:
    """Defects by checks: how many of its cases each check caught, in the codes of `family_table`."""
    parts = sorted({part_of(check) for check in matrix.codes}, key=lambda part: part or len(PARTS))
    rows = []
    for name, lines in matrix.by_name.items():
        caught = sum(line.caught for line in lines)
        count = f"{caught} of {len(lines)}" if caught == len(lines) else f"**{caught} of {len(lines)}**"
        by = matrix.caught(lines)
        cells = (
            ", ".join(f"{matrix.codes[check]} ×{hits}" for check, hits in by.items() if part_of(check) == part)
            for part in parts
        )
        rows.append((code(name), prose(lines[0].family), count, *cells))
    return table(("defect", "family", "caught", *(part_title(part) for part in parts)), rows)


def sweep_table(sweep: Sequence[SweepLine]) -> str:
    """The smallest scale error from which on everything is caught, place by place."""
    scales = sorted({line.scale for line in sweep})
    rows = []
    for (where, method), hits in _places(sweep).items():
        smallest = _smallest(hits)
        words = "none of these" if smallest is None else percent_of(smallest)
        rows.append((code(where), method, f"**{words}**", *(_hits(hits.get(scale, ())) for scale in scales)))
    header = ("where", "method", "caught from", *(percent_of(scale) for scale in scales))
    return table(header, rows, numeric=range(2, len(header)))


def _places(sweep: Sequence[SweepLine]) -> dict[tuple[str, str], dict[float, list[bool]]]:
    """Whether each try was caught, by scale, by place and method."""
    places: dict[tuple[str, str], dict[float, list[bool]]] = {}
    for line in sweep:
        places.setdefault((line.where, line.method), {}).setdefault(line.scale, []).append(line.caught)
    return places


def _hits(caught: Sequence[bool]) -> str:
    return f"{sum(caught)} of {len(caught)}" if caught else NOTHING


def _smallest(hits: dict[float, list[bool]]) -> float | None:
    """From which scale on every try was caught, None if not even at the largest."""
    smallest = None
    for scale in sorted(hits, reverse=True):
        if not all(hits[scale]):
            break
        smallest = scale
    return smallest


def smallest_everywhere(sweep: Sequence[SweepLine]) -> str | None:
    """The scale error from which on every try in every place was caught, in percent; None if there is none."""
    found = [_smallest(hits) for hits in _places(sweep).values()]
    return None if not found or None in found else percent_of(max(found))


def percent_of(scale: float) -> str:
    return f"{number(100 * scale)} %"


def planted_table(lines: Sequence[SensitivityLine]) -> str:
    """Every planted defect with the real bug behind it, once over all devices."""
    known: dict[str, list[SensitivityLine]] = {}
    for line in sorted(lines, key=lambda line: (line.family, line.name)):
        if line.kind == "mutant":
            known.setdefault(line.name, []).append(line)
    rows = []
    for name, own in known.items():
        magnitudes = ", ".join(number(value) for value in sorted({line.magnitude for line in own}))
        layers = ", ".join(prose(layer) for layer in dict.fromkeys(line.layer for line in own))
        unit = f" ({prose(own[0].unit)})" if own[0].unit else ""
        rows.append((code(name), prose(own[0].family), prose(own[0].modelled_on), layers, f"{magnitudes}{unit}"))
    return table(("defect", "family", "modelled on", "layers", "magnitudes"), rows)
