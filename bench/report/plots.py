"""The report's figures as PNG bytes that depend on the records alone.

Why PNG: every viewer shows it, and it is what people paste. Why its bytes repeat: matplotlib's Agg canvas is used without
pyplot, every setting is reset to matplotlib's defaults first, the font is the DejaVu that matplotlib carries, and the
Software, version and date entries are left out. What may still differ between machines is how the image library compresses
the same pixels, so each PNG also holds a digest of the numbers it shows, and `same_image` compares digest and pixels.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image, UnidentifiedImageError

from bench import records
from bench.records import Record
from bench.report import text

SIGMA_BAND = 6.0  # the band drawn around the reference, in standard deviations of the noise floor
DIGEST = "isoloss records"  # the PNG text entry that marks our files
PIXEL_TOLERANCE = 24  # of 255: what another rounding in antialiasing may change
HUGE = 1e30  # beyond this a loss is drawn as non-finite
REFERENCE, CANDIDATE, ALARM, BAND = "#a6c8ea", "#0b2a4a", "#c0392b", "#dfeee0"
COLORS = {"ships": "#2e7d4f", "optimization": "#7a93ac", "combination": "#4a6785", "peer": "#c9a66b", "repeat": "#c9ced6"}
NOTES = {"peer": "  (peer)", "repeat": "  (the reference against itself)"}
STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#30343b",
    "xtick.color": "#555b66",
    "ytick.color": "#555b66",
    "grid.color": "#e8eaed",
    "legend.frameon": False,
    "text.parse_math": False,  # a "$" in a name is a dollar
}


def loss_plot(record: Record, device: str) -> bytes:
    """Loss of reference and candidate by step, and below it their difference beside the noise floor, as a PNG."""

    def draw(figure: Figure) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        title = f"{label(record.arm, 48)}: {record.verdict.level.value}"
        top.set_title(f"{title}\n{label(device, 48)}, run {label(record.run_id, 28)}", fontsize=11)
        _draw_losses(top, record)
        _draw_difference(bottom, record)
        bottom.set_xlabel("step")
        count = max(len(record.losses), len(record.reference_losses))
        margin = min(0.9, 0.3 + 0.02 * count)
        bottom.set_xlim(1 - margin, count + margin)
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))

    return _png(draw, (8.0, 5.6), ["loss", device, records.to_json(record)])


def ratio_plot(current: Sequence[Record], shipped: Record | None, device: str) -> bytes:
    """Speed of every timed arm over the reference's as bars with their 95 % intervals, as a PNG."""
    timed = sorted((record for record in current if record.perf and record.role != "reference"), key=_speed)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_title(label(f"Speed over the reference on {device}", 80))
        _draw_bars(axes, timed, shipped)
        axes.set_xlabel("time of the reference / time of the arm (higher is faster)")

    name = "" if shipped is None else shipped.arm
    return _png(draw, (8.0, 1.7 + 0.42 * len(timed)), ["ratio", device, name, *map(records.to_json, current)])


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
        error_kw={"ecolor": "#30343b", "capsize": 3, "elinewidth": 1.2},
    )  # fmt: skip
    end = max(1.0, *high, *ratios)
    for row, (record, edge) in enumerate(zip(timed, np.maximum(high, ratios), strict=True)):
        note = "  ships" if record is shipped else NOTES.get(record.role, "")
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


def _draw_losses(axes: Axes, record: Record) -> None:
    reference, losses = _finite(record.reference_losses), _finite(record.losses)
    dot = "o" if max(len(reference), len(losses)) == 1 else None  # one step makes no line
    if len(reference):
        axes.plot(_steps(reference), reference, color=REFERENCE, marker=dot, lw=6, solid_capstyle="round", label="reference")
    axes.plot(_steps(losses), losses, color=CANDIDATE, lw=1.5, ls=(0, (4, 2)), marker=dot, ms=3, label=label(record.arm, 40))
    for values, color, height in ((reference, REFERENCE, 0.10), (losses, ALARM, 0.03)):
        bad = np.flatnonzero(~np.isfinite(values)) + 1
        if len(bad):
            place = axes.get_xaxis_transform()
            name = "reference not finite" if color == REFERENCE else f"not finite from step {bad[0]}"
            axes.plot(bad, np.full(len(bad), height), "x", color=color, mew=2, transform=place, label=name, clip_on=False)
    axes.set_ylabel("loss (nats per\nsupervised token)")
    axes.grid()
    if len(losses) or len(reference):
        axes.legend(loc="best")


def _draw_difference(axes: Axes, record: Record) -> None:
    shared = min(len(record.losses), len(record.reference_losses))
    losses, reference = _finite(record.losses[:shared]), _finite(record.reference_losses[:shared])
    difference, steps = losses - reference, _steps(losses)
    axes.grid()
    axes.axhline(0, color="#8a8f98", lw=1)
    if not shared:
        axes.set_yticks([])
        return _note(axes, "no reference losses to compare with", "#555b66")
    if not difference.any():  # nan is not zero
        axes.set_ylim(-1, 1)
        axes.set_yticks([0])
        axes.set_ylabel("difference")
        axes.plot(steps, difference, color=CANDIDATE, lw=1.5)
        return _note(
            axes, f"losses bit-identical at {'the only step' if shared == 1 else f'all {shared} steps'}", COLORS["ships"]
        )
    sigma = _finite(record.noise_sigma[:shared])
    if len(sigma) == shared and np.all(np.isfinite(sigma)) and np.any(sigma > 0):
        _draw_sigmas(axes, steps, difference, sigma)
    else:
        axes.plot(steps, difference, color=CANDIDATE, lw=1.5, marker=_marker(steps), ms=3)
        axes.set_ylabel("difference (nats)")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    return None


def _draw_sigmas(axes: Axes, steps: np.ndarray, difference: np.ndarray, sigma: np.ndarray) -> None:
    """A step whose sigma is zero has no place on this axis unless its difference is zero too: it is marked instead."""
    quiet = sigma == 0
    scaled = np.where(quiet, 0.0, difference / np.where(quiet, 1.0, sigma))
    scaled = _finite(np.where(quiet & (difference != 0), np.nan, scaled))
    axes.axhspan(-SIGMA_BAND, SIGMA_BAND, color=BAND, zorder=0)
    axes.plot(steps, scaled, color=CANDIDATE, lw=1.5, marker=_marker(steps), ms=3)
    off = ~np.isfinite(scaled)
    if off.any():
        place = axes.get_xaxis_transform()
        axes.plot(
            steps[off], np.full(off.sum(), 0.05), "x", color=ALARM, mew=2, transform=place, label="not finite, or σ is 0"
        )
        axes.legend(loc="best", fontsize=9)
    low, high = np.nanmin(scaled, initial=-SIGMA_BAND), np.nanmax(scaled, initial=SIGMA_BAND)
    if max(-low, high) > 4 * SIGMA_BAND:  # keep the band visible beside a candidate that is far outside
        axes.set_yscale("symlog", linthresh=SIGMA_BAND)
        axes.set_yticks(_symlog_ticks(max(-low, high)), minor=False)
        axes.set_yticks([], minor=True)
        axes.set_ylim(*(1.6 * edge if abs(edge) == SIGMA_BAND else 2.5 * edge for edge in (low, high)))
    else:
        axes.set_yticks(np.arange(-24, 25, 3 if max(-low, high) == SIGMA_BAND else 6))
        axes.set_ylim(1.25 * low, 1.25 * high)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.0e}"))
    axes.set_ylabel(f"difference (σ)\nshaded: ±{SIGMA_BAND:.0f}σ")


def _symlog_ticks(reach: float) -> list[float]:
    """0, the edges of the band, and at most four powers of ten on each side."""
    exponents = np.arange(2, np.floor(np.log10(reach)) + 1)
    powers = [float(10.0**exponent) for exponent in exponents[:: -(-len(exponents) // 4) or 1]]
    edges = [-SIGMA_BAND, 0.0, SIGMA_BAND] if len(exponents) <= 6 else [0.0]  # labels of a band that thin would overlap
    return [*(-power for power in reversed(powers)), *edges, *powers]


def _marker(steps: np.ndarray) -> str | None:
    return "o" if len(steps) <= 80 else None


def _note(axes: Axes, words: str, color: str) -> None:
    axes.text(0.5, 0.72, words, transform=axes.transAxes, ha="center", va="center", color=color, weight="bold")


def _finite(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    return np.where(np.abs(array) < HUGE, array, np.nan)  # comparisons with nan are false, so nan stays nan


def _steps(values: np.ndarray) -> np.ndarray:
    return np.arange(1, len(values) + 1)


def label(words: str, longest: int) -> str:
    """Text for a figure: one line, at most `longest` characters, "?" for what DejaVu Sans can't draw."""
    words = text.one_line(words)
    words = words if len(words) <= longest else words[: longest - 1] + "…"
    glyphs = get_font(findfont("DejaVu Sans")).get_charmap()
    return "".join(char if ord(char) in glyphs else "?" for char in words)


def _png(draw: Callable[[Figure], None], size: tuple[float, float], shown: list[str]) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # no matplotlibrc of the user's
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=size, dpi=130, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        with np.errstate(all="ignore"):
            draw(figure)
        digest = hashlib.sha256(json.dumps(shown).encode()).hexdigest()
        figure.savefig(buffer, format="png", metadata={"Software": None, DIGEST: digest})
    return buffer.getvalue()


def is_ours(data: bytes) -> bool:
    """Whether this module made that PNG."""
    return _open(data)[0] is not None


def same_image(one: bytes, two: bytes) -> bool:
    """Whether two PNGs show the same numbers: same digest, same size, and pixels alike within antialiasing's rounding."""
    if one == two:
        return True
    (digest, left), (other, right) = _open(one), _open(two)
    if digest is None or digest != other or left.shape != right.shape:
        return False
    return bool(np.abs(left.astype(int) - right.astype(int)).max(initial=0) <= PIXEL_TOLERANCE)


def _open(data: bytes) -> tuple[str | None, np.ndarray]:
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            return image.info.get(DIGEST), np.asarray(image.convert("RGBA"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):  # what Pillow raises for broken files
        return None, np.zeros((0, 0, 4))
