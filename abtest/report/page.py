"""The page of one gated arm: its verdict, every check beside its limit, its loss, and where the difference starts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from abtest.markdown import (
    MARK,
    NOTHING,
    code,
    facts,
    folded,
    names,
    number,
    one_line,
    page_name,
    prose,
    scalar,
    shell,
    table,
    trained,
)
from abtest.report.origin import origin
from abtest.report.records import Gated, GateRecord
from abtest.verdict import PARTS, Check, Level

SIGMA = "σ is the standard deviation of the loss at that step over perturbed references: the noise floor."
SHOWN = 40  # names of a census in one list
WRONG = (Level.FAILED.value, Level.INVALID.value)
FIELD_ORDER = (1, 2, 3, 4, 5, 0)


def file_name(record: GateRecord) -> str:
    """The page's name without extension, another one for every (name, model, method)."""
    parts = (record.name, record.model, record.method)
    dotted = "." in record.name or "." in record.method  # then the parts could not be told apart again
    return page_name(json.dumps(parts) if dotted else ".".join(parts))


def gate_page(gated: Gated) -> str:
    """Markdown of `reports/gate/<device_slug>/<file_name>.md`."""
    record = gated.record
    plotted = bool(record.losses)
    sections = [
        f"<!-- {MARK} -->\n# The gate of {code(record.name)} on {prose(gated.device)}",
        _verdict(record),
        f"{trained(record.recipe, record.environment)} · run {code(record.run_id)}, finished {prose(record.finished_at)}",
        "**Gated from a working tree with uncommitted changes.**" if record.environment.get("git_dirty") else "",
        _what(record),
        "## Checks\n\n" + _checks(record.verdict.checks),
        "## Loss\n\n" + _loss(record, file_name(record)) if plotted else "",
        "## Where the difference starts\n\n" + origin(record.trace),
        "## What ran\n\n" + _census(record),
        "## Op checks\n\n" + _op(record),
        "## Autotune\n\n" + _autotune(record),
        "## Notes\n\n" + "\n".join(f"- {prose(note)}" for note in record.notes) if record.notes else "",
        "## Where it comes from\n\n" + _provenance(gated),
        "[All gates](../README.md)",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _verdict(record: GateRecord) -> str:
    level = record.verdict.level
    words = "lossless" if level.lossless else "not run here" if level is Level.NOT_RUN else "not lossless"
    lines = [f"> **{level.value}** ({words}): {prose(record.verdict.reason)}"]
    failed = [check for check in record.verdict.checks if not check.passed]
    if failed:
        listed = ", ".join(dict.fromkeys(prose(check.name) for check in failed))
        lines.append(f"> {len(failed)} of {len(record.verdict.checks)} checks failed: {listed}")
    return "\n>\n".join(lines)


def _what(record: GateRecord) -> str:
    rows = [
        ("what it does", prose(record.summary) or NOTHING),
        ("switched on", names(record.optimizations) or NOTHING),
        ("planted defect or rewrite", code(record.planted) if record.planted else NOTHING),
        ("exactness claimed", prose(record.claim.upper()) or NOTHING),
        ("why exact", prose(record.why_exact) or NOTHING),
        ("implementations that ran", scalar("paths", record.environment.get("paths"))),
    ]
    return table(("", ""), rows)


def _checks(checks: Sequence[Check]) -> str:
    if not checks:
        return "No check was made: the verdict says why."
    sections = [table(("check", "passed", "closest to its limit", "value", "limit"), _overview(checks), numeric=(3, 4))]
    for part in FIELD_ORDER:
        own = [check for check in checks if check.part == part]
        if own:
            rows = [
                (prose(check.name), number(check.value), number(check.limit), "pass" if check.passed else "**FAIL**",
                 prose(check.state) or NOTHING, prose(check.detail) or NOTHING) for check in own
            ]  # fmt: skip
            header = ("check", "value", "limit", "", "weights", "worst")
            sections.append(f"### {part_title(part)}\n\n{table(header, rows, numeric=(1, 2))}")
    return "\n\n".join(sections)


def part_title(part: int) -> str:
    """A part of the gate with its number, as in "2 gradient oracle"; what is none of the five has no number."""
    return f"{part} {PARTS[part]}" if part else PARTS[part].capitalize()


def _overview(checks: Sequence[Check]) -> list[tuple[str, ...]]:
    rows = []
    for part in FIELD_ORDER:
        own = [check for check in checks if check.part == part]
        if own:
            closest = max((check for check in own if check.value is not None and check.limit), key=_share, default=None)
            passed = sum(check.passed for check in own)
            count = f"{passed} of {len(own)}" if passed == len(own) else f"**{passed} of {len(own)}**"
            at = f", {prose(closest.state)}" if closest and closest.state else ""
            rows.append((
                part_title(part), count, f"{prose(closest.name)}{at}" if closest else NOTHING,
                number(closest.value) if closest else NOTHING, number(closest.limit) if closest else NOTHING,
            ))  # fmt: skip
    return rows


def _share(check: Check) -> float:
    """How much of its limit a check uses; one that had to reach its limit uses none of it."""
    if math.isnan(check.value):
        return math.inf
    return 0.0 if check.passed and abs(check.value) > abs(check.limit) else abs(check.value) / abs(check.limit)


def _loss(record: GateRecord, name: str) -> str:
    parts = [f"![Loss of {name} and of the reference by step, and their difference]({name}.png)"]
    shared = list(zip(record.losses, record.reference_losses, record.noise_sigma, strict=False))
    if shared:
        apart = [_distance(loss, reference, sigma) for loss, reference, sigma in shared]
        worst = max(range(len(apart)), key=lambda step: math.inf if math.isnan(apart[step]) else abs(apart[step]))
        total = sum(apart) / math.sqrt(len(apart))
        parts.append(
            f"Largest difference {number(apart[worst])} σ, at step {worst} of 0 to {len(apart) - 1} "
            f"(loss {number(record.losses[worst], 7)} beside {number(record.reference_losses[worst], 7)}, "
            f"σ {number(record.noise_sigma[worst])}); the sum over steps, divided by the root of their number, is "
            f"{number(total)} σ. {SIGMA}"
        )
    return "\n\n".join(parts)


def _distance(loss: float, reference: float, sigma: float) -> float:
    if loss == reference:
        return 0.0
    return (loss - reference) / sigma if sigma else math.nan


def _census(record: GateRecord) -> str:
    if not record.census:
        return "What ran was not counted."
    reference, candidate = (by_kind(record.census[side]) for side in ("reference", "candidate"))
    rows = [
        (prose(kind), *(f"{sum(side.get(kind, {}).values()):,}" for side in (reference, candidate)))
        for kind in dict.fromkeys((*reference, *candidate))
    ]
    counts = table(("counted in one micro-step", "reference", "candidate"), rows, numeric=(1, 2))
    new = _listed("Only the candidate runs", record.census["new"])
    gone = _listed("The candidate runs less often, or not at all", record.census["gone"])
    return "\n\n".join((counts, new, gone))


def by_kind(side: dict) -> dict[str, dict[str, int]]:
    """Counts by kind and name; counts by name alone are of one kind."""
    if any(isinstance(count, dict) for count in side.values()):
        return {kind: count if isinstance(count, dict) else {kind: count} for kind, count in side.items()}
    return {"all": side} if side else {}


def _listed(what: str, found: Sequence[str]) -> str:
    if not found:
        return f"{what}: nothing."
    rest = f", and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f"{what}: {', '.join(code(name) for name in found[:SHOWN])}{rest}."


def _op(record: GateRecord) -> str:
    if not record.op:
        return "None was made: there is no op of its own, or it was left out."
    failed = [row for row in record.op if row["level"] in WRONG]
    ordered = [*failed, *(row for row in record.op if row not in failed)]
    rows = [
        (code(row["op"]) if row.get("op") else NOTHING, prose(row["workload"]), str(row["seed"]),
         f"**{row['level']}**" if row["level"] in WRONG else row["level"], prose(row["reason"])) for row in ordered
    ]  # fmt: skip
    idle = sum(row["level"] == "NOT_RUN" for row in record.op)
    words = f"{len(rows) - idle} against fp64 truth, " + (f"**{len(failed)} failed**" if failed else "none failed")
    words += f"; {idle} not run here." if idle else "."
    return (
        words + "\n\n" + folded("Every one of them", ("op", "workload", "seed", "level", "decided by"), rows, numeric=(2,))
    )


def _autotune(record: GateRecord) -> str:
    return facts(record.autotune) if record.autotune else "No kernel of it is autotuned."


def _provenance(gated: Gated) -> str:
    record = gated.record
    spent = ", ".join(f"{prose(name)} {number(value, 4)} s" for name, value in record.seconds.items() if ": " not in name)
    calls = sorted(((value, name) for name, value in record.seconds.items() if ": " in name), reverse=True)
    rows = [(*map(prose, name.split(": ", 1)), number(value, 3)) for value, name in calls]
    older = f" {gated.older} older {'record' if gated.older == 1 else 'records'} not shown." if gated.older else ""
    environment = {key: value for key, value in record.environment.items() if key != "paths"}
    parts = [
        f"Run {code(record.run_id)}, finished {prose(record.finished_at)}.{older}",
        f"Time it took: {spent}." if spent else "",
        folded("What arms were asked for, side by side", ("arm", "command", "seconds"), rows, numeric=(2,)) if rows else "",
        f"```sh\n{shell(record.command)}\n```" if one_line(record.command) else "",
        facts({key: value for key, value in record.recipe.items() if value is not None}) if record.recipe else "",
        "Data:\n\n" + facts(record.data) if record.data else "",
        "Environment:\n\n" + facts(environment) if environment else "",
    ]
    return "\n\n".join(part for part in parts if part)
