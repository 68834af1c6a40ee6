"""The page of searches: the way to each setting's fastest set, its members' gains, and the waterfall from stock to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from abtest.markdown import folded
from bench.report import plots, waterfall
from bench.report.settings import Trained, folder_names, trained
from bench.report.text import MARK, NOTHING, code, memory, names, number, per_second, prose, ratio, setting_words, table
from bench.report.waterfall import Answers, Waterfall, gain_words
from bench.search import trials
from bench.search.trials import LEAVE_ONE_OUT, Set, Trial
from kernels.registry import in_update

FOLDER = Path("search")
WHAT = (
    "Gains do not add up, so sets are timed. A search adds to the best set so far what is clearly faster with it, puts what "
    "conflicts with a member in its place, and at last leaves out each member in turn: who is not missed goes. Every ratio "
    "is of two processes timed in turn, in brackets its 95 % interval. The sets on the way were not gated, and nothing here "
    "is a claim about them; each setting's own pages have the gate and the speed of the answer beside stock. The newest "
    "search of each device and setting counts."
)
PATH_LEGEND = "Every row is one set beside the best so far: what was added to it (+) or taken from it (−)."
GAINS_LEGEND = (
    "The gain is the time of the set without the member over the time of the whole set. Gains of members that do the same "
    "work are small each, and their product is not what all of them buy together. What works in the update alone "
    "is on in every set: the micro-step that is timed can't show it."
)


@dataclass(frozen=True)
class Step:
    """From one best set to the next. trial: the comparison that decided; None if its record is not there."""

    before: Set
    after: Set
    trial: Trial | None

    @property
    def ratio(self) -> float:
        return 1.0 if self.trial is None else self.trial.timing.ratio


@dataclass(frozen=True)
class Way:
    """One search, read back from its trials, oldest first."""

    trials: tuple[Trial, ...]

    @property
    def newest(self) -> Trial:
        return self.trials[-1]

    @property
    def left_out(self) -> tuple[Trial, ...]:
        """The set that came last, without each of its members that a micro-step shows; empty where not all were timed."""
        last = self.newest.against
        found = [
            trial
            for trial in self.trials
            if trial.stage == LEAVE_ONE_OUT and trial.against == last and not in_update(trial.left_out[0])
        ]
        return tuple(found) if {trial.left_out[0] for trial in found} == set(_timed(last)) else ()

    @property
    def dropped(self) -> Trial | None:
        """Who goes next by the last comparison, if anybody does."""
        unneeded = [trial for trial in self.left_out if not trial.needed]
        return min(unneeded, key=lambda trial: trial.gain[0], default=None)

    @property
    def is_measured(self) -> bool:
        """Whether the set that came last is the answer, and was timed without each of its members."""
        return bool(self.left_out) and self.dropped is None

    @property
    def bests(self) -> list[Set]:
        """The best sets, one after another."""
        found = list(dict.fromkeys(trial.against for trial in self.trials))
        return [*found, self.dropped.optimizations] if self.dropped is not None else found

    @property
    def answer(self) -> Set | None:
        """The set that the search ended with; None where its trials don't say that it came to its end."""
        if self.dropped is None:
            return self.newest.against if self.left_out else None
        return self.dropped.optimizations if _timed(self.dropped.optimizations) else None

    @property
    def steps(self) -> list[Step]:
        found = {(trial.against, trial.optimizations): trial for trial in self.trials if trial.timing.why is None}
        steps = [Step(one, other, found.get((one, other))) for one, other in pairwise(self.bests)]
        gaps = [index for index, step in enumerate(steps) if step.trial is None]  # another search of the run ends there
        return steps[gaps[-1] + 1 :] if gaps else steps

    @property
    def begin(self) -> str:
        """What `steps` lead away from."""
        return "the given set" if self.steps and self.steps[0].before else "stock"


def _timed(optimizations: Set) -> Set:
    """Those whose work is in the micro-step."""
    return tuple(name for name in optimizations if not in_update(name))


def files(data_dir: Path, answers: Answers) -> dict[Path, bytes]:
    """The page and its plots, relative to the folder of reports, and their bytes; empty where nothing was searched. answers:
    the gated and timed records of searches' answers. Raises UserError naming file and line for a trial that is not valid."""
    sections, content = [f"<!-- {MARK} -->\n# Searches", WHAT], {}
    devices = trials.load(data_dir)
    for slug in sorted(devices):
        ways = newest_ways(devices[slug])
        name = str(devices[slug][-1].environment.get("device") or slug)
        sections.append(f"## {prose(name)}")
        for folder, way in zip(folder_names(list(ways)), ways.values(), strict=True):
            image, members = f"{slug}-{folder}.png", f"{slug}-{folder}.members.png"
            if way.steps:
                steps = [(_words(step), step.ratio) for step in way.steps]
                content[FOLDER / image] = plots.waterfall(steps, name, way.begin)
            answer = answers.get((slug, way.newest.run_id, way.newest.against))
            fall = Waterfall(answer, way.left_out) if way.is_measured and answer is not None else None
            if fall is not None:
                content[FOLDER / members] = waterfall.picture(fall, name)
            shown = [_no_waterfall(way)] if fall is None else waterfall.section(fall, members)
            sections += _section(way, shown, image if way.steps else None)
    if devices:
        page = "\n\n".join((*sections, "[All reports](../README.md)")) + "\n"
        content[FOLDER / "README.md"] = page.encode("utf-8", "replace")
    return content


def newest_ways(found: Sequence[Trial]) -> dict[Trained, Way]:
    """The newest search of each setting, from one device's trials, oldest first; in the reports' order."""
    settings: dict[Trained, list[Trial]] = {}
    for trial in found:
        settings.setdefault(trained(trial), []).append(trial)
    return {setting: _newest(settings[setting]) for setting in sorted(settings, key=lambda setting: setting.order)}


def _newest(found: Sequence[Trial]) -> Way:
    last = found[-1]
    same = [trial for trial in found if (trial.run_id, trial.candidates) == (last.run_id, last.candidates)]
    return Way(tuple(same))


def _section(way: Way, fall: Sequence[str], image: str | None) -> list[str]:
    gains = way.left_out
    return [
        f"### {setting_words(way.newest) or NOTHING}",
        _headline(way),
        *fall,
        *(["#### What each member is worth", _gains(gains), GAINS_LEGEND] if gains else []),
        "#### The way there",
        f"![Time of a micro-step from {way.begin} to the best set, step by step]({image})" if image else "",
        _path(way),
        PATH_LEGEND,
        _source(way),
    ]


def _no_waterfall(way: Way) -> str:
    return waterfall.NO_TIME if way.is_measured else waterfall.NO_LEAVE_ONE_OUT


def _headline(way: Way) -> str:
    among = f"Searched among {names(way.newest.candidates)}."
    if way.answer is not None:
        return f"> **{names(way.answer)}** is the fastest set.\n\n{among}"
    last = way.bests[-1]
    if way.dropped is not None:
        return f"> **Nothing is faster than stock**, clearly and in a fresh process.\n\n{among}"
    if not last:
        return f"> **Nothing was clearly faster than stock** so far.\n\n{among}"
    so_far = f"> **{names(last)}** is the best set so far: the search has not come to its end."
    return f"{so_far} `--run {prose(way.newest.run_id)}` goes on with it.\n\n{among}"


def _gains(left_out: Sequence[Trial]) -> str:
    header = (
        "member",
        "gain",
        "real tok/s without it",
        "memory without it",
        "with it",
        "launches without it",
        "stays?",
    )
    ordered = sorted(left_out, key=lambda trial: -trial.gain[0] if trial.gain else float("-inf"))
    return table(header, [_gain_row(trial) for trial in ordered], numeric=range(1, 6))


def _gain_row(trial: Trial) -> tuple[str, ...]:
    timing, name = trial.timing, code(trial.left_out[0])
    if trial.gain is None:
        return (name, *[NOTHING] * 5, f"yes: without it the rest does not run: {prose(timing.why)}")
    used = [memory(value) for value in (timing.peak_memory_bytes, timing.against_peak_memory_bytes)]
    launches = NOTHING if timing.launches is None else f"{timing.launches:,}"
    return name, gain_words(trial.gain), per_second(timing.real_tokens_per_s), *used, launches, _stays(trial)


def _stays(trial: Trial) -> str:
    low, high = trial.gain[1:]
    if trial.needed:
        return "yes" if low > 1 else "yes: it saves memory"
    return "no: slower with it" if high < 1 else "no: it does nothing here"


def _path(way: Way) -> str:
    header = ("round", "stage", "on already", "tried", "ratio", "micro-step", "what came of it")
    taken = {(step.before, step.after) for step in way.steps}
    rows = [_path_row(trial, (trial.against, trial.optimizations) in taken) for trial in way.trials]
    return folded("Every comparison", header, rows, numeric=(0, 2, 4, 5))


def _path_row(trial: Trial, taken: bool) -> tuple[str, ...]:
    timing = trial.timing
    change = " ".join((*(f"− {code(name)}" for name in trial.left_out), *(f"+ {code(name)}" for name in trial.added)))
    first = (str(trial.round), trial.stage, str(len(trial.against)), change)
    if timing.why is not None:
        return (*first, NOTHING, NOTHING, prose(timing.why))
    return (*first, ratio(timing), f"{number(timing.micro_step_ms, 4)} ms", _outcome(trial, taken))


def _outcome(trial: Trial, taken: bool) -> str:
    if taken:
        return "**dropped**" if trial.stage == LEAVE_ONE_OUT else "**taken**"
    if trial.faster:
        return "faster"
    return "slower" if trial.timing.ratio_high < 1 else "no clear difference"


def _words(step: Step) -> str:
    gone = [f"− {name}" for name in step.before if name not in step.after]
    return " ".join((*gone, *(f"+ {name}" for name in step.after if name not in step.before)))


def _source(way: Way) -> str:
    newest = way.newest
    sha, dirty = newest.environment.get("git_sha"), newest.environment.get("git_dirty")
    commit = f"commit {code(str(sha)[:7])}" if sha else "unknown commit"
    commands = _distinct(code(trial.command) for trial in way.trials)
    unclean = " **with uncommitted changes**" if dirty else ""
    return f"Run {code(newest.run_id)}, {commit}{unclean}, finished {prose(newest.finished_at)}: {', '.join(commands)}."


def _distinct(values: Iterable[str]) -> Mapping[str, None]:
    return dict.fromkeys(values)
