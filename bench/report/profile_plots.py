"""The stacked bars of the profile page: what a micro-step's time goes to, one bar a profiled set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from abtest.figures import label, png
from bench.profile import groups

COLORS = {
    "matrix": "#0b2a4a",
    "recurrence": "#2f6690",
    "attention": "#6fa3c7",
    "elementwise": "#c9a66b",
    "norm": "#e2c99a",
    "copy": "#b5655a",
    "loss": "#7d8f69",
    "optimizer": "#5f4b66",
    "host": "#b7a6b0",
    "other": "#30343b",
}
IDLE = "#eceef1"


@dataclass(frozen=True)
class Bar:
    """seconds: by group. idle_s: in which the device does nothing; None where nobody knows."""

    name: str
    seconds: Mapping[str, float]
    idle_s: float | None


def stacked(bars: Sequence[Bar], title: str, shown: str) -> bytes:
    """One bar a set, the first on top, as PNG; shown: every other word and number that the figure depends on."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_title(label(title, 80))
        _draw(axes, bars)
        axes.set_xlabel("ms of one micro-step, forward and backward")

    digest = [repr((bar.name, dict(bar.seconds), bar.idle_s)) for bar in bars]
    return png(draw, (9.5, 2.1 + 0.5 * len(bars)), ["profile", title, shown, *digest])


def _draw(axes: Axes, bars: Sequence[Bar]) -> None:
    rows = range(len(bars))
    at = [0.0] * len(bars)
    for group, words in groups.WORDS.items():
        widths = [1e3 * bar.seconds.get(group, 0.0) for bar in bars]
        if any(widths):
            axes.barh(rows, widths, left=at, height=0.62, color=COLORS[group], label=words)
            at = [one + other for one, other in zip(at, widths, strict=True)]
    idle = [1e3 * (bar.idle_s or 0.0) for bar in bars]
    if any(bar.idle_s is not None for bar in bars):
        axes.barh(rows, idle, left=at, height=0.62, color=IDLE, edgecolor="#c9ced6", hatch="///", lw=0.5, label="idle")
        at = [one + other for one, other in zip(at, idle, strict=True)]
    end = max(*at, 1e-9)
    for row, width in zip(rows, at, strict=True):
        axes.text(width + 0.01 * end, row, f"{width:,.0f}" if width >= 1e3 else f"{width:.4g}", va="center", fontsize=9)
    axes.set_yticks(rows, [label(bar.name, 34) for bar in bars])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1.1 * end)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
