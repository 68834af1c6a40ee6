"""`reports/gate/README.md`: what the gate catches and what it lets through, by device, and links to every gated arm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from abtest.markdown import MARK, NOTHING, code, facts, number, percent, prose, shell, table, trained
from abtest.report.detection import family_table, mutant_table, part_table, planted_table, smallest_everywhere, sweep_table
from abtest.report.intervals import at_most, interval
from abtest.report.matrix import Matrix, beyond_preflight, defects
from abtest.report.page import file_name
from abtest.report.records import Gated
from abtest.report.sensitivity_records import SPLITS, Sensitivity, SensitivityLine, SweepLine
from abtest.report.survivors import equivalent_table, margin_table, survivor_table, survivors

INTRODUCTION = """\
The judge, judged. `python -m abtest.sensitivity` plants defects that are modelled on real bugs, and honest rewrites, on a
small model, and puts each through the whole gate. Calibration and hold-out share no seed and no defect: limits may be set by
looking at the first, and are judged by the second. A defect that changes no bit is equivalent, and counts nowhere. Intervals
are exact (Clopper-Pearson, 95 %) and take cases as independent; those of one defect are not quite, so defects are counted,
too."""


def readme(found: Sequence[Sensitivity], gated: Sequence[Gated], op_tests: Callable[[], Mapping[str, str]]) -> str:
    """Markdown of `reports/gate/README.md`. op_tests: asked only where a defect survived."""
    sections = [f"<!-- {MARK} -->\n# Can the gate be trusted?", INTRODUCTION if found else ""]
    sections += [device_section(sensitivity, op_tests) for sensitivity in found]
    if found:
        every = [line for sensitivity in found for line in sensitivity.lines]
        sections.append("## What is planted\n\n" + planted_table(every))
    if gated:
        sections.append("## Gated arms\n\n" + _pages(gated))
    return "\n\n".join(section for section in sections if section) + "\n"


def device_section(sensitivity: Sensitivity, op_tests: Callable[[], Mapping[str, str]]) -> str:
    lines, limits = sensitivity.lines, sensitivity.facts.get("limits", {})
    matrix, through = Matrix.of(lines), survivors(lines)
    tests = op_tests() if through else {}
    heading = f"### {{}} on {prose(sensitivity.device)}\n\n"
    sections = [
        f"## {prose(sensitivity.device)}",
        headline(lines, sensitivity.sweep),
        _setting(sensitivity),
        rates(lines),
        heading.format("Survivors") + survivor_table(through, limits, tests) if defects(lines) else "",
        heading.format("False alarms") + _alarms(lines),
        heading.format("Smallest scale error") + sweep_table(sensitivity.sweep) if sensitivity.sweep else "",
        heading.format("What each part catches") + part_table(matrix) if matrix.codes else "",
        heading.format("Checks by families") + family_table(matrix) if matrix.codes else "",
        f"![Which check catches which defect]({sensitivity.slug}/sensitivity.png)" if matrix.codes else "",
        heading.format("Defects by checks") + mutant_table(matrix) if matrix.codes else "",
        heading.format("Margins of honest rewrites") + margin_table(lines, limits),
        heading.format("Equivalent cases") + equivalent_table(lines),
        heading.format("The run") + _run(sensitivity),
    ]
    return "\n\n".join(section for section in sections if section)


def headline(lines: Sequence[SensitivityLine], sweep: Sequence[SweepLine]) -> str:
    held, first = (defects(_split(lines, split)) for split in ("holdout", "calibration"))
    benign = [line for line in lines if line.kind == "benign"]
    alarms = sum(line.caught for line in benign)
    edge = smallest_everywhere(sweep)
    words = [
        f"**Hold-out: {_rate(held)}.**" if held else "**No defect on hold-out.**",
        f"Calibration: {_rate(first)}." if first else "",
        f"**Honest rewrites flagged: {_false(alarms, len(benign))}.**" if benign else "**No honest rewrite was gated.**",
        f"A scale error of one projection is caught from {edge} on, wherever it was tried." if edge else "",
    ]
    return "> " + "\n>\n> ".join(word for word in words if word)


def _split(lines: Iterable[SensitivityLine], split: str) -> list[SensitivityLine]:
    return [line for line in lines if line.split == split]


def _rate(own: Sequence[SensitivityLine]) -> str:
    caught = sum(line.caught for line in own)
    low, high = interval(caught, len(own))
    return (
        f"{caught} of {len(own)} planted cases caught, {percent(caught / len(own))} (95 % interval {percent(low)} to "
        f"{percent(high)}); {sum(map(beyond_preflight, own))} without preflight, by checks 2 to 5 alone"
    )


def _false(alarms: int, runs: int) -> str:
    return f"{alarms} of {runs}; with 95 % confidence at most {percent(at_most(alarms, runs))}"


def _setting(sensitivity: Sensitivity) -> str:
    run = sensitivity.facts
    if not run:
        return "The run left no facts beside its outcome."
    carrier = ", ".join(code(str(name)) for name in run.get("carrier") or ())
    parts = [
        trained(run["recipe"] | {"method": None}, run["environment"]),
        f"run {code(run['run_id'])}, finished {prose(run['finished'])}",
        f"{number(run['seconds'] / 60)} minutes",
        f"on in every arm, the reference included: {carrier}" if carrier else "",
    ]
    dirty = "\n\n**Measured from a working tree with uncommitted changes.**" if run["environment"].get("git_dirty") else ""
    return " · ".join(part for part in parts if part) + dirty


def rates(lines: Sequence[SensitivityLine]) -> str:
    """Detection and false alarms by split and method."""
    header = (
        "split", "method", "cases", "equivalent", "caught", "rate", "95 % interval", "without preflight",
        "defects always caught", "honest rewrites", "flagged", "at most (95 %)",
    )  # fmt: skip
    methods = sorted({line.method for line in lines}, reverse=True)  # LoRA first
    groups = [(split, method) for split in SPLITS for method in (*methods, "all")] + [("both", "all")]
    rows = []
    for split, method in groups:
        own = [
            line for line in lines if (split == "both" or line.split == split) and (method == "all" or line.method == method)
        ]
        if own and not (method == "all" and len(methods) == 1 and split != "both"):
            rows.append((SHORT[split], method, *_rates(own)))
    return table(header, rows, numeric=range(2, len(header)))


SHORT = {"calibration": "calibration", "holdout": "**hold-out**", "both": "both"}


def _rates(own: Sequence[SensitivityLine]) -> tuple[str, ...]:
    found, mutants = defects(own), [line for line in own if line.kind == "mutant"]
    benign = [line for line in own if line.kind == "benign"]
    caught, alarms = sum(line.caught for line in found), sum(line.caught for line in benign)
    low, high = interval(caught, len(found))
    named = {line.name for line in found}
    always = len(named - {line.name for line in found if not line.caught})
    return (
        str(len(mutants)), str(len(mutants) - len(found)), str(caught),
        percent(caught / len(found)) if found else NOTHING,
        f"{percent(low)} to {percent(high)}" if found else NOTHING,
        str(sum(map(beyond_preflight, found))), f"{always} of {len(named)}" if found else NOTHING,
        str(len(benign)), str(alarms) if not alarms else f"**{alarms}**",
        percent(at_most(alarms, len(benign))) if benign else NOTHING,
    )  # fmt: skip


def _alarms(lines: Sequence[SensitivityLine]) -> str:
    rows = [
        (code(line.name), line.method, str(line.seed), line.split, line.level, prose(line.reason))
        for line in lines
        if line.kind == "benign" and line.caught
    ]
    header = ("honest rewrite", "method", "seed", "split", "level", "reason")
    return table(header, rows, numeric=(2,)) if rows else "None."


def _run(sensitivity: Sensitivity) -> str:
    run, lines = sensitivity.facts, sensitivity.lines
    mutants = {line.name for line in lines if line.kind == "mutant"}
    rewrites = {line.name for line in lines if line.kind == "benign"}
    seeds = sorted({line.seed for line in lines})
    counts = {
        "gates": len(lines) + len(sensitivity.sweep),
        "defects": f"{len(mutants)} in {len({line.family for line in lines if line.kind == 'mutant'})} families, "
        f"{sum(line.kind == 'mutant' for line in lines)} cases",
        "honest rewrites": f"{len(rewrites)}, {sum(line.kind == 'benign' for line in lines)} runs",
        "scale errors": len(sensitivity.sweep),
        "seeds": f"{len(seeds)}: {', '.join(map(str, seeds))}",
    }
    if not run:
        return facts(counts)
    timing = {"started": run["started"], "finished": run["finished"], "seconds": run["seconds"]}
    recipe = {key: value for key, value in run["recipe"].items() if value is not None}
    return "\n\n".join((
        facts(counts | timing), "Limits:\n\n" + table(("", ""), [(code(k), number(v)) for k, v in run["limits"].items()]),
        f"```sh\n{shell(run['command'])}\n```", facts(recipe), facts(run["environment"]),
    ))  # fmt: skip


def _pages(gated: Sequence[Gated]) -> str:
    rows = [
        (
            f"[{code(one.record.name)}]({one.slug}/{file_name(one.record)}.md)",
            prose(one.device),
            trained(one.record.recipe, one.record.environment),
            f"**{one.record.verdict.level.value}**",
            prose(one.record.verdict.reason),
            f"{number(one.record.seconds['total'])} s" if "total" in one.record.seconds else NOTHING,
            prose(one.record.finished_at),
        )
        for one in gated
    ]
    return table(("arm", "device", "trained", "verdict", "decided by", "took", "finished"), rows, numeric=(5,))
