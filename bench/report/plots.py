"""The reports' figures: speeds as bars, each arm's loss beside the reference's, and the way to the fastest set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from abtest.figures import ALARM, DIGEST, GOOD, is_ours, label, png, same_image
from abtest.report import loss
from abtest.report.loss import LossCurve
from bench.records import Record
from bench.report import text

__all__ = [
    "COLORS", "DIGEST", "Floating", "change_color", "floating", "is_ours", "loss_plot", "ratio_plot", "same_image",
    "waterfall",
]  # fmt: skip

COLORS = {
    "ships": GOOD, "optimization": "#7a93ac", "negative": "#b7a6b0", "combination": "#4a6785", "peer": "#c9a66b",
    "repeat": "#c9ced6",
}  # fmt: skip
INK, LINE = "#30343b", "#8a8f98"  # of error bars, from one bar of a waterfall to the next
NOTES = {"peer": "  (peer)", "negative": "  (negative result)", "repeat": "  (the reference against itself)"}


def loss_plot(record: Record, device: str) -> bytes:
    """Loss of reference and candidate by step, and below it their difference beside the noise floor, as a PNG."""
    curve = LossCurve(record.arm, record.losses, record.reference_losses, record.noise_sigma)
    return loss.loss_plot(curve, record.verdict.level.value, device, record.run_id)


def ratio_plot(current: Sequence[Record], shipped: Record | None, device: str) -> bytes:
    """Speed of every timed arm over the reference's as bars with their 95 % intervals, as a PNG."""
    timed = sorted((record for record in current if record.perf and record.role != "reference"), key=_speed)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_title(label(f"Speed over the reference on {device}", 80))
        _draw_bars(axes, timed, shipped)
        axes.set_xlabel("time of the reference / time of the arm (higher is faster)")

    name = "" if shipped is None else shipped.arm
    return png(draw, (8.0, 1.7 + 0.42 * len(timed)), ["ratio", device, name, *map(_bar, timed)])


def _bar(record: Record) -> str:
    """All that a bar shows: what else a record holds, or comes to hold, draws no other picture."""
    perf = record.perf
    return repr((record.arm, record.role, record.verdict.level.value, perf.ratio, perf.ratio_low, perf.ratio_high))


def _speed(record: Record) -> float:
    return record.perf.ratio if np.isfinite(record.perf.ratio) else 0.0


def _draw_bars(axes: Axes, timed: Sequence[Record], shipped: Record | None) -> None:
    ratios = np.array([_speed(record) for record in timed])
    low, high = (np.array([getattr(record.perf, name) for record in timed]) for name in ("ratio_low", "ratio_high"))
    low, high = np.where(np.isfinite(low), low, ratios), np.where(np.isfinite(high), high, ratios)
    roles = ["ships" if record is shipped else record.role for record in timed]
    errors = np.maximum([ratios - low, high - ratios], 0)
    axes.barh(
        range(len(timed)), ratios, xerr=errors, height=0.62, color=[COLORS[role] for role in roles],
        error_kw={"ecolor": INK, "capsize": 3, "elinewidth": 1.2},
    )  # fmt: skip
    end = max(1.0, *high, *ratios)
    for row, (record, edge) in enumerate(zip(timed, np.maximum(high, ratios), strict=True)):
        note = "  ships" if record is shipped else NOTES.get(record.role, "")
        if text.timed_all_the_same(record):
            note = f"  (peer, {record.verdict.level.value})"
        bold = "bold" if record is shipped else "normal"
        beside = max(edge, 1.0) + 0.015 * end  # right of the line at 1, too
        axes.text(beside, row, text.ratio(record.perf) + note, va="center", fontsize=9, weight=bold)
    axes.set_yticks(range(len(timed)), [label(record.arm, 32) for record in timed])
    axes.set_xlim(0, end * 1.55)
    axes.set_ylim(-0.6, len(timed) - 0.4)
    axes.axvline(1.0, color=ALARM, lw=1, ls=(0, (4, 3)))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_axisbelow(True)


@dataclass(frozen=True)
class Floating:
    """A bar of a waterfall, from `start` to `end`. interval: where its end may lie."""

    words: str
    start: float
    end: float
    color: str
    note: str
    interval: tuple[float, float] | None = None

    @property
    def left(self) -> float:
        return min(self.start, self.end, *(self.interval or ()))

    @property
    def right(self) -> float:
        return max(self.start, self.end, *(self.interval or ()))


def waterfall(steps: Sequence[tuple[str, float]], device: str, begin: str = "stock") -> bytes:
    """Time of a micro-step as a share of `begin`'s, from there through `steps` to what they lead to, as a PNG. A step is
    what changed and the ratio of times before and after it."""
    times = np.cumprod([100.0, *(1 / ratio for _, ratio in steps)]).tolist()
    bars = [Floating(begin, 0.0, times[0], COLORS["peer"], "100 %")]
    for (words, ratio), before, after in zip(steps, times, times[1:], strict=False):
        bars.append(Floating(words, before, after, change_color(before, after), f"{ratio:.3f}x"))
    bars.append(Floating("the best set", 0.0, times[-1], COLORS["ships"], f"{times[-1]:.1f} %"))
    unit = f"time of a micro-step, % of {begin}'s (lower is faster)"
    return floating(bars, f"From {begin} to the best set on {device}", unit)


def change_color(before: float, after: float) -> str:
    """Of a step from one time to another."""
    return COLORS["optimization"] if after <= before else ALARM


def floating(bars: Sequence[Floating], title: str, unit: str) -> bytes:
    """Bars below one another, the first on top, as a PNG."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_title(label(title, 80))
        _draw_floating(axes, bars)
        axes.set_xlabel(unit)

    return png(draw, (8.0, 1.7 + 0.42 * len(bars)), ["waterfall", title, unit, *map(repr, bars)])


def _draw_floating(axes: Axes, bars: Sequence[Floating]) -> None:
    left, right = min(0.0, *(bar.left for bar in bars)), max(bar.right for bar in bars)
    left -= 0.02 * (right - left) if left < 0 else 0.0
    for row, bar in enumerate(bars):
        axes.barh(row, abs(bar.end - bar.start), left=min(bar.start, bar.end), height=0.62, color=bar.color)
        if bar.interval is not None:
            errors = np.maximum([[bar.end - bar.interval[0]], [bar.interval[1] - bar.end]], 0)
            axes.errorbar(bar.end, row, xerr=errors, ecolor=INK, capsize=3, elinewidth=1.2)
        if row < len(bars) - 1:  # down to where the next one begins
            axes.vlines(bar.end, row + 0.31, row + 0.69, color=LINE, lw=0.8)
        axes.text(bar.right + 0.012 * (right - left), row, bar.note, va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [label(bar.words, 44) for bar in bars])
    axes.set_xlim(left, left + (right - left) * 1.3)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
