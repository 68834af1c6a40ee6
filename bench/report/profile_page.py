"""The page of profiles, from reports/data/profile alone: where a step's time and memory go, stock and sets side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abtest import markdown
from abtest.markdown import folded, memory
from bench.profile import groups
from bench.profile.memory import COUNTED, WORDS
from bench.profile.records import FOLDER, ProfileRecord, busy_share, load
from bench.report.flame import LEGEND, flame
from bench.report.profile_plots import Bar, stacked
from bench.report.settings import Trained, folder_names, trained_by
from bench.report.text import MARK, NOTHING, code, names, number, page_name, percent, prose, table

PAGE = Path(FOLDER) / "README.md"
AIM = 0.95
WHAT = (
    "Where the time of a training step goes, and who holds its memory: stock and sets of optimizations side by side, by "
    "`python -m bench.profile`. The newest record of each set counts. It asks no gate; whether a set is lossless, and what "
    "it is worth against stock in turn, is for the pages of the devices to say."
)
TIMES = (
    "Times without the profiler: the median of several repetitions, micro-steps in a row and already on the device; the "
    "step is the whole optimizer step, from fetching its batches to reading the gradients' norm."
)
BUSY = (
    "Busy is the time in which at least one kernel, copy or fill runs on any stream, as the profiler's trace says, over the "
    "wall time without the profiler, which slows the host down but not the kernels. The aim is {aim} of the step. Launches "
    "are calls of the host; the kernels of a graph share one."
)
BY_KERNELS = (
    "Of one micro-step, by the names of its kernels; a kernel of an optimization's own counts where its folder belongs. "
    "Stock's delta rule in pure PyTorch shows as the products, copies and elementwise kernels that it is made of."
)
BY_OPERATORS = (
    "Of one micro-step, PyTorch's operators by their own time under the profiler, which makes each a little slower, and "
    "those without arithmetic a lot. What Python does in between is not in it. Stock's delta rule in pure PyTorch shows as "
    "the products, copies and elementwise operators that it is made of."
)
BY_ALLOCATOR = (
    "Weights, moments and gradients by their tensors, storage that several share once; what layers keep and the loss head's "
    "growth by the allocator at the seams of a micro-step that is not replayed from a graph."
)
MEMORY = {
    COUNTED: f"{BY_ALLOCATOR} The peak is of the measured steps, or what stays with the process between them, pools of "
    "graphs included, if that is more.",
    "allocator": f"{BY_ALLOCATOR} The peak is of the measured steps; memory that graphs hold is in the last row alone.",
    "saved tensors": "Weights, moments and gradients by their tensors, storage that several share once; what layers and the "
    "loss keep by what autograd saves. The peak is the resident memory of the whole process.",
}


@dataclass(frozen=True)
class Profiled:
    """One set: a short name that is unique in its setting, and its newest record."""

    name: str
    record: ProfileRecord

    @property
    def phases(self) -> dict[str, Any]:
        return self.record.result["phases"]

    @property
    def on_device(self) -> bool:
        return self.phases["step"]["busy_s"] is not None


def files(data_dir: Path) -> dict[Path, bytes]:
    """The page and its figures, relative to the folder of reports; empty where there is no record. Raises UserError naming
    file and line for a record that is not valid."""
    devices = load(data_dir)
    if not devices:
        return {}
    content: dict[Path, bytes] = {}
    sections = [f"<!-- {MARK} -->\n# Where the time goes", WHAT]
    for slug, records in sorted(devices.items()):
        sections.append(f"## {prose(str(records[-1].environment.get('device') or slug))}")
        settings = by_setting(records)
        for folder, (trained, sets) in zip(folder_names(list(settings)), settings.items(), strict=True):
            figures = _figures(f"{slug}/{folder}", trained, sets)
            content |= {Path(FOLDER) / path: data for path, data in figures.items()}
            sections += _setting(f"{slug}/{folder}", sets, set(figures))
    text = "\n\n".join((*sections, "[All reports](../README.md)")) + "\n"
    return content | {PAGE: text.encode("utf-8", "replace")}


def by_setting(records: Iterable[ProfileRecord]) -> dict[Trained, list[Profiled]]:
    """The newest record of each set, by what was trained; of two of one second the later line. Stock comes first, then the
    smaller sets."""
    found: dict[Trained, dict[tuple[str, ...], ProfileRecord]] = {}
    for record in sorted(records, key=lambda record: record.finished):
        recipe, enabled = record.result["recipe"], tuple(sorted(record.result["enabled"]))
        found.setdefault(trained_by(recipe, recipe.get("dtype")), {})[enabled] = record
    ordered = sorted(found.items(), key=lambda item: item[0].order)
    return {trained: _named([own[key] for key in sorted(own, key=lambda key: (len(key), key))]) for trained, own in ordered}


def _named(records: Sequence[ProfileRecord]) -> list[Profiled]:
    named: list[Profiled] = []
    for record in records:
        enabled = record.result["enabled"]
        name = " + ".join(enabled) or "stock"
        if len(enabled) > 2:
            name = f"{'what ships' if record.result['shipping'] else 'together'}, {len(enabled)}"
        same = sum(other.name.partition(" (")[0] == name for other in named)
        named.append(Profiled(f"{name} ({same + 1})" if same else name, record))
    return named


def _figures(stem: str, trained: Trained, sets: Sequence[Profiled]) -> dict[str, bytes]:
    """Of one setting, by path below the folder of profiles."""
    device = str(sets[-1].record.environment.get("device") or "")
    title = f"Where a micro-step's time goes on {device}: {trained.model}, {trained.method}"
    found = {f"{stem}.png": stacked([_bar(one) for one in sets], title, repr(trained))}
    for one in sets:
        stacks = one.record.result["stacks"]
        if "missing" not in stacks:
            found[_flame_path(stem, one)] = flame(stacks, f"{one.name}, host stacks of {trained.model} on {device}")
    return found


def _flame_path(stem: str, one: Profiled) -> str:
    return f"{stem}.{page_name('+'.join(one.record.result['enabled']) or 'stock')}.svg"


def _bar(one: Profiled) -> Bar:
    phase = one.phases["micro_step"]
    idle = max(0.0, phase["wall_s"] - phase["busy_s"]) if one.on_device else None
    return Bar(one.name, phase["groups"], idle)


def _setting(stem: str, sets: Sequence[Profiled], figures: set[str]) -> list[str]:
    newest = sets[-1].record
    device = any(one.on_device for one in sets)
    return [
        f"### {markdown.trained(newest.result['recipe'], {}) or NOTHING}",
        f"![time by group]({stem}.png)",
        _times(sets, device),
        f"{TIMES} {BUSY.format(aim=percent(AIM))}" if device else TIMES,
        _by_group(sets),
        BY_KERNELS if device else BY_OPERATORS,
        _by_owner(sets),
        *_of_memory(sets),
        *(part for one in sets for part in _details(stem, one, figures)),
        "#### Where it comes from",
        _sources(sets),
    ]


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 1 else number(1e3 * seconds, 4)


def _times(sets: Sequence[Profiled], device: bool) -> str:
    on_device = ("step busy", "micro-step busy", "kernels", "copies", "launches", "graphs launched") if device else ()
    header = ("set", "micro-step ms", "update ms", "step ms", *on_device, "peak memory")
    rows = []
    for one in sets:
        walls = [ms(one.phases[phase]["wall_s"]) for phase in ("micro_step", "update", "step")]
        peak = memory(one.record.result["memory"]["peak"])
        rows.append((prose(one.name), *walls, *(_on_device(one) if device else ()), peak))
    return table(header, rows, numeric=range(1, len(header)))


def _on_device(one: Profiled) -> list[str]:
    if not one.on_device:
        return [NOTHING] * 6
    step, micro = one.phases["step"], one.phases["micro_step"]
    share = percent(busy_share(step))
    counts = [f"{micro[key]:,.0f}" for key in ("kernels", "copies", "launches", "graph_launches")]
    return [f"**{share}**" if busy_share(step) >= AIM else share, percent(busy_share(micro)), *counts]


def _by_group(sets: Sequence[Profiled]) -> str:
    sums = [one.phases["micro_step"]["groups"] for one in sets]
    rows = []
    for group, words in groups.WORDS.items():
        if any(group in own for own in sums):
            rows.append((words, *(_share(own.get(group), sum(own.values())) for own in sums)))
    rows.append(("**sum**", *(f"**{ms(sum(own.values()))}**" for own in sums)))
    return table(("ms", *(prose(one.name) for one in sets)), rows, numeric=range(1, len(sets) + 1))


def _share(seconds: float | None, whole: float) -> str:
    return NOTHING if seconds is None else f"{ms(seconds)} ({percent(seconds / (whole or 1))})"


def _by_owner(sets: Sequence[Profiled]) -> str:
    rows = [(words, *(memory(one.record.result["memory"][owner]) for one in sets)) for owner, words in WORDS.items()]
    return table(("memory", *(prose(one.name) for one in sets)), rows, numeric=range(1, len(sets) + 1))


def _of_memory(sets: Sequence[Profiled]) -> list[str]:
    """How memory was counted; where that differs, in which sets."""
    names: dict[str, list[str]] = {}
    for one in sets:
        names.setdefault(one.record.result["memory"]["counted_by"], []).append(f"`{one.name}`")
    known = [(MEMORY[name], own) for name, own in names.items() if name in MEMORY]
    return [words if len(names) == 1 else f"{', '.join(own)}: {words}" for words, own in known]


def _details(stem: str, one: Profiled, figures: set[str]) -> list[str]:
    """Of one set: what is on, its longest kernels or operators, its gaps and its host."""
    result = one.record.result
    on = f"On: {names(result['enabled'])}." if result["enabled"] else "Nothing is switched on."
    refused = "".join(f" Not enabled: {code(name)}: {prose(str(why))}." for name, why in result["refused"].items())
    parts = [f"#### {prose(one.name)}", on + refused, _longest(one), *(_gaps(one) if one.on_device else [])]
    path, stacks = _flame_path(stem, one), result["stacks"]
    if path not in figures:
        return [*parts, f"No host stacks: {prose(stacks['missing'])}."]
    top = ", ".join(f"{code(frame)} {percent(samples / max(stacks['samples'], 1))}" for frame, samples in stacks["own"][:5])
    return [*parts, f"[Flame graph of the host]({path}). {LEGEND} Most stacks end in {top}."]


def _longest(one: Profiled) -> str:
    phase = one.phases["micro_step"]
    whole = sum(phase["groups"].values())
    rows = [
        (code(row["name"]), groups.WORDS[row["group"]], code(row["owner"]) if row["owner"] else "", ms(row["seconds"]),
         percent(row["seconds"] / (whole or 1)), number(row["count"], 4)) for row in phase["names"]
    ]  # fmt: skip
    header = ("kernel" if one.on_device else "operator", "group", "optimization", "ms", "share", "times")
    return folded("What takes longest in a micro-step, and all that no group knows", header, rows, numeric=(3, 4, 5))


def _gaps(one: Profiled) -> list[str]:
    step = one.phases["step"]
    rows = [(code(gap["host"]), ms(gap["at_s"]), ms(gap["seconds"])) for gap in step["gaps"]]
    by = ", ".join(f"{code(host)} {ms(seconds)}" for host, seconds in step["idle_by"].items())
    said = (
        f"The device idles {ms(step['idle_s'])} ms of a step under the profiler, whose step takes "
        f"{ms(step['traced_wall_s'])} ms and not {ms(step['wall_s'])}. By what the host was at, ms: {by or NOTHING}. "
        "The longest gaps:"
    )
    return [said, table(("the host was at", "after ms", "ms"), rows, numeric=(1, 2))]


def _sources(sets: Sequence[Profiled]) -> str:
    rows = []
    for one in sets:
        environment = one.record.environment
        sha, versions = environment.get("git_sha"), environment.get("versions") or {}
        commit = (code(str(sha)[:7]) if sha else "unknown") + (" **with changes**" if environment.get("git_dirty") else "")
        torch = prose(f"torch {versions.get('torch', '?')}")
        rows.append((prose(one.name), prose(one.record.finished_at), commit, torch, code(one.record.command)))
    return table(("set", "finished", "commit", "versions", "command"), rows)
