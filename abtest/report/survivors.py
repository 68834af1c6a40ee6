"""What came through and how close it was: surviving defects, equivalent ones, and the margins of honest rewrites."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from abtest.markdown import NOTHING, code, number, percent, prose, table
from abtest.report.checks import limit_of, part_of, rank
from abtest.report.matrix import defects
from abtest.report.page import part_title
from abtest.report.sensitivity_records import SPLITS, SensitivityLine


def survivors(lines: Sequence[SensitivityLine]) -> list[SensitivityLine]:
    """Defects that change something and passed the whole gate."""
    return [line for line in defects(lines) if not line.caught]


def survivor_table(through: Sequence[SensitivityLine], limits: Mapping[str, float], op_tests: Mapping[str, str]) -> str:
    """Each surviving case by name, the check that came closest, and the op-level test that catches the defect."""
    if not through:
        return "None: every defect that changes something was caught."
    rows = [
        (
            code(line.name), prose(line.layer), magnitude(line), line.method, str(line.seed), line.split,
            _closest(line, limits), code(op_tests[line.name]) if line.name in op_tests else "**none yet**",
        )
        for line in sorted(through, key=lambda line: (line.name, line.layer, line.magnitude, line.method, line.seed))
    ]  # fmt: skip
    header = ("defect", "layer", "magnitude", "method", "seed", "split", "closest check", "caught at op level by")
    return table(header, rows, numeric=(4,))


def magnitude(line: SensitivityLine) -> str:
    return number(line.magnitude) + (f" ({prose(line.unit)})" if line.unit else "")


def _closest(line: SensitivityLine, limits: Mapping[str, float]) -> str:
    """Of the checks on the candidate, the one that used most of its limit."""
    known = {check: limit for check in line.values if (limit := limit_of(check, limits)) and part_of(check) > 1}
    if not known:
        return NOTHING
    check = max(known, key=lambda check: share(line.values[check], known[check]))
    return f"{prose(check)}: {number(line.values[check])} beside {number(known[check])}"


def share(value: float, limit: float) -> float:
    """How much of its limit a value uses; not a number uses more than all of it."""
    return math.inf if math.isnan(value) else value / limit


def equivalent_table(lines: Sequence[SensitivityLine]) -> str:
    """Planted cases that changed no bit of any loss, gradient or weight, by name."""
    groups: dict[str, list[SensitivityLine]] = {}
    for line in lines:
        if line.kind == "mutant" and line.equivalent:
            groups.setdefault(line.name, []).append(line)
    if not groups:
        return "None: every planted defect changed something."
    rows = []
    for name in sorted(groups):
        where = (f"{prose(line.layer)}, {magnitude(line)}, {line.method}, seed {line.seed}" for line in groups[name])
        rows.append((code(name), str(len(groups[name])), "; ".join(where), str(sum(line.caught for line in groups[name]))))
    header = ("defect", "cases", "layer, magnitude, method, seed", "not lossless all the same")
    return table(header, rows, numeric=(1, 3))


def margin_table(lines: Sequence[SensitivityLine], limits: Mapping[str, float]) -> str:
    """For every check with a limit, how close the worst honest rewrite came: what the limits are calibrated on."""
    benign = [line for line in lines if line.kind == "benign"]
    checks = sorted({check for line in benign for check in line.values if limit_of(check, limits) is not None}, key=rank)
    if not checks:
        return "No honest rewrite has a value beside a limit."
    rows = []
    for check in checks:
        limit = limit_of(check, limits)
        worst = [
            _worst([line for line in benign if line.split == split and check in line.values], check) for split in SPLITS
        ]
        used = [share(line.values[check], limit) for line in worst if line is not None]
        cells = [cell for line in worst for cell in _worst_cells(line, check)]
        rows.append(
            (part_title(part_of(check)), prose(check), number(limit), *cells, _bold(percent(max(used)), max(used) > 1))
        )
    header = ("part", "check", "limit", "calibration", "which rewrite", "hold-out", "which rewrite", "of the limit")
    return table(header, rows, numeric=(2, 3, 5, 7))


def _bold(words: str, bold: bool) -> str:
    return f"**{words}**" if bold else words


def _worst(lines: Sequence[SensitivityLine], check: str) -> SensitivityLine | None:
    return max(lines, key=lambda line: math.inf if math.isnan(line.values[check]) else line.values[check], default=None)


def _worst_cells(line: SensitivityLine | None, check: str) -> tuple[str, str]:
    if line is None:
        return NOTHING, NOTHING
    return number(line.values[check]), f"{code(line.name)}, {line.method}, seed {line.seed}"
