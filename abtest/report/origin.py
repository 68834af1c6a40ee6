"""Where in the network a candidate's difference from the reference starts, and how it grows from layer to layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from abtest.markdown import NOTHING, code, folded, number

TIMES = 2.0  # a distance is out of proportion beyond so many times the reference's own from the oracle
WORDS = {"forward": "Forward", "backward": "Backward"}


def origin(trace: Sequence[dict[str, Any]]) -> str:
    """Markdown: the first place with other bits, the first that is out of proportion, and every place's distances."""
    if not trace:
        return "No trace was made."
    sentences = [_first(phase, [row for row in trace if row["phase"] == phase]) for phase in WORDS]
    note = (
        "Distances are relative to the reference's norm: of the candidate from the reference, and beside it of the "
        "reference from the oracle, which is what rounding costs here. Backward runs from the last row to the first."
    )
    return "\n\n".join((*filter(None, sentences), note, _table(trace)))


def _first(phase: str, rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    other = next((row for row in rows if not row["same_bits"]), None)
    if other is None:
        return f"**{WORDS[phase]}**: the same bits at all {len(rows)} places."
    words = f"**{WORDS[phase]}**: bits first differ at {_at(other)}"
    far = next((row for row in rows if _out_of_proportion(row)), None)
    if far is None:
        return f"{words}; nowhere further than {number(TIMES)} times the reference is from the oracle."
    return f"{words}; first further than {number(TIMES)} times the reference is from the oracle at {_at(far)}."


def _at(row: dict[str, Any]) -> str:
    return f"{code(row['module'])} ({number(row['relative'])} beside {number(row['beside'])})"


def _out_of_proportion(row: dict[str, Any]) -> bool:
    return not row["same_bits"] and not row["relative"] <= TIMES * row["beside"]  # not a number is out of proportion


def _table(trace: Sequence[dict[str, Any]]) -> str:
    at = {(row["module"], row["phase"]): row for row in trace}
    modules = dict.fromkeys(row["module"] for row in sorted(trace, key=lambda row: row["phase"] == "backward"))
    rows = [
        (code(module), *_cells(at.get((module, "forward"))), *_cells(at.get((module, "backward")))) for module in modules
    ]
    header = ("place", "forward", "beside", "", "backward", "beside", "")
    return folded("Every place", header, rows, numeric=(1, 2, 4, 5))


def _cells(row: dict[str, Any] | None) -> tuple[str, str, str]:
    if row is None:
        return NOTHING, NOTHING, ""
    mark = "same bits" if row["same_bits"] else f"**over {number(TIMES)}×**" if _out_of_proportion(row) else ""
    return number(row["relative"]), number(row["beside"]), mark
