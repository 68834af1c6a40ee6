"""From stock to the answer of a search: what each member takes away, measured by leaving it out, and what is left over."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench.records import Record
from bench.report import plots
from bench.report.devices import Device
from bench.report.plots import COLORS, Floating, change_color
from bench.report.shipping import Shipping
from bench.report.text import NOTHING, code, prose, ratio, sound, table
from bench.search.trials import Set, Trial

HEADER = ("", "ms of a micro-step", "its 95 % interval", "ratio")
REST = "interaction"
LEGEND = (
    "Stock and the last row were timed in turn, after the gate. A member's ratio is what the search lost by leaving "
    "it out, and its milliseconds are that ratio's at the speed of the last row. Interaction is what these gains do "
    "not add up to: of members that do the same work none is missed while the other is there, and those that need "
    "each other are each credited with what they only do together."
)
NO_LEAVE_ONE_OUT = "No waterfall: what is lost without each member of the best set has not been timed."
NO_TIME = "No waterfall: this set has no lossless record with a time beside stock in the search's run."


@dataclass(frozen=True)
class Answer:
    """The timed record of a search's answer, and whether it is what ships."""

    record: Record
    ships: bool


Answers = Mapping[tuple[str, str, Set], Answer]  # by device slug, run and set


def answers(devices: Iterable[tuple[Device, Sequence[Shipping]]]) -> dict[tuple[str, str, Set], Answer]:
    """The newest of each combination: a search's answer may be one that had its record before."""
    found = {}
    for device, decisions in devices:
        for setting, decision in zip(device.settings, decisions, strict=True):
            for record in (*setting.earlier, *setting.run):
                if record.role == "combination" and sound(record.perf):
                    key = (device.slug, record.run_id, tuple(sorted(record.optimizations)))
                    found[key] = Answer(record, record is decision.basis)
    return found


@dataclass(frozen=True)
class Fall:
    """One row between stock and the answer. ms: what it takes away, of a micro-step; None where nobody could time it.
    interval: where that may lie. gain: time without it over time with it, and the ends of its 95 % interval."""

    name: str
    ms: float | None
    interval: tuple[float, float] | None = None
    gain: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Waterfall:
    """left_out: the answer without each of its members. Milliseconds are rounded as they are shown, so that what is shown
    adds up."""

    answer: Answer
    left_out: tuple[Trial, ...]

    @property
    def last(self) -> str:
        return "what ships" if self.answer.ships else "the answer"

    @property
    def decimals(self) -> int:
        """Four digits of stock's time."""
        perf = self.answer.record.perf
        return max(0, 3 - math.floor(math.log10(perf.micro_step_ms * perf.ratio)))

    @property
    def stock_ms(self) -> float:
        """At the ratio of the same turns; stock's own record may be of other minutes."""
        perf = self.answer.record.perf
        return self._rounded(perf.micro_step_ms * perf.ratio)

    @property
    def answer_ms(self) -> float:
        return self._rounded(self.answer.record.perf.micro_step_ms)

    @property
    def members(self) -> list[Fall]:
        """What gains most first, what could not be timed last."""
        ordered = sorted(self.left_out, key=lambda trial: -trial.gain[0] if trial.gain else math.inf)
        return [self._member(trial) for trial in ordered]

    @property
    def rest(self) -> Fall:
        known = sum(member.ms for member in self.members if member.ms is not None)
        return Fall(REST, self._rounded(self.stock_ms - self.answer_ms - known))

    def _member(self, trial: Trial) -> Fall:
        if trial.gain is None:
            return Fall(trial.left_out[0], None)
        ms, *interval = (self._rounded(self.answer.record.perf.micro_step_ms * (value - 1)) for value in trial.gain)
        return Fall(trial.left_out[0], ms, tuple(interval), trial.gain)

    def _rounded(self, value: float) -> float:
        return round(value, self.decimals)

    def time(self, ms: float) -> str:
        return f"{ms:,.{self.decimals}f}"

    def change(self, taken: float) -> str:
        """What taking away so many milliseconds does to the time, with its sign."""
        return f"{0 - taken:+,.{self.decimals}f}".replace("-", "−")


def section(fall: Waterfall, image: str) -> list[str]:
    """Markdown: the picture, the table and what they mean."""
    title = f"From stock to {fall.last}"
    return [f"#### {title}", f"![{title}, member by member]({image})", _table(fall), LEGEND]


def gain_words(gain: tuple[float, float, float]) -> str:
    middle, low, high = gain
    return f"{middle:.3f}x [{low:.3f}, {high:.3f}]"


def _table(fall: Waterfall) -> str:
    rows = [("stock", f"**{fall.time(fall.stock_ms)}**", NOTHING, NOTHING)]
    rows += [_row(fall, member) for member in fall.members]
    rows.append((f"*{REST}*", fall.change(fall.rest.ms), NOTHING, NOTHING))
    last = f"**{fall.time(fall.answer_ms)}**"
    rows.append((prose(fall.last), last, NOTHING, f"{ratio(fall.answer.record.perf)} in all"))
    return table(HEADER, rows, numeric=range(1, 4))


def _row(fall: Waterfall, member: Fall) -> tuple[str, ...]:
    if member.ms is None:
        return f"{code(member.name)}: without it the rest does not run, so it is in the {REST}", *[NOTHING] * 3
    low, high = member.interval
    interval = f"[{fall.change(high)}, {fall.change(low)}]"
    return code(member.name), fall.change(member.ms), interval, gain_words(member.gain)


def picture(fall: Waterfall, device: str) -> bytes:
    """The waterfall as a PNG, without members that could not be timed."""
    level = fall.stock_ms
    bars = [Floating("stock", 0.0, level, COLORS["peer"], f"{fall.time(level)} ms")]
    for member in (*fall.members, fall.rest):
        if member.ms is not None:
            bars.append(_bar(fall, member, level))
            level -= member.ms
    whole = f"{fall.time(fall.answer_ms)} ms ({fall.answer.record.perf.ratio:.2f}x)"
    bars.append(Floating(fall.last, 0.0, fall.answer_ms, COLORS["ships"], whole))
    return plots.floating(bars, f"From stock to {fall.last} on {device}", "ms of a micro-step (lower is faster)")


def _bar(fall: Waterfall, member: Fall, level: float) -> Floating:
    end = level - member.ms
    if member.gain is None:
        return Floating(member.name, level, end, COLORS["negative"], f"{fall.change(member.ms)} ms")
    interval = (level - member.interval[1], level - member.interval[0])
    note = f"{fall.change(member.ms)} ms ({member.gain[0]:.3f}x)"
    return Floating(member.name, level, end, change_color(level, end), note, interval)
