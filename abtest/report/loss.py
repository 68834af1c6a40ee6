"""The loss of an arm beside the reference's, and below it their difference beside the noise floor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from abtest.figures import ALARM, BAND, CANDIDATE, GOOD, REFERENCE, label, png

SIGMA_BAND = 6.0  # the band drawn around the reference, in standard deviations of the noise floor
HUGE = 1e30  # beyond this a loss is drawn as non-finite


@dataclass(frozen=True)
class LossCurve:
    """Per step: losses of an arm and of the reference, and the standard deviation of perturbed references around it.

    first: the number of the first step on the axis.
    """

    name: str
    losses: tuple[float, ...]
    reference_losses: tuple[float, ...]
    noise_sigma: tuple[float, ...]
    first: int = 1


def loss_plot(curve: LossCurve, level: str, device: str, run_id: str) -> bytes:
    """Loss of reference and candidate by step, and below it their difference beside the noise floor, as a PNG."""

    def draw(figure: Figure) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        title = f"{label(curve.name, 48)}: {level}"
        top.set_title(f"{title}\n{label(device, 48)}, run {label(run_id, 28)}", fontsize=11)
        _draw_losses(top, curve)
        _draw_difference(bottom, curve)
        bottom.set_xlabel("step")
        count = max(len(curve.losses), len(curve.reference_losses))
        margin = min(0.9, 0.3 + 0.02 * count)
        bottom.set_xlim(curve.first - margin, curve.first + count - 1 + margin)
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))

    return png(draw, (8.0, 5.6), ["loss", device, run_id, level, repr(curve)])


def _draw_losses(axes: Axes, curve: LossCurve) -> None:
    reference, losses = _finite(curve.reference_losses), _finite(curve.losses)
    dot = "o" if max(len(reference), len(losses)) == 1 else None  # one step makes no line
    if len(reference):
        axes.plot(
            _steps(reference, curve), reference, color=REFERENCE, marker=dot, lw=6, solid_capstyle="round", label="reference"
        )
    axes.plot(
        _steps(losses, curve), losses, color=CANDIDATE, lw=1.5, ls=(0, (4, 2)), marker=dot, ms=3, label=label(curve.name, 40)
    )
    for values, color, height in ((reference, REFERENCE, 0.10), (losses, ALARM, 0.03)):
        bad = np.flatnonzero(~np.isfinite(values)) + curve.first
        if len(bad):
            place = axes.get_xaxis_transform()
            name = "reference not finite" if color == REFERENCE else f"not finite from step {bad[0]}"
            axes.plot(bad, np.full(len(bad), height), "x", color=color, mew=2, transform=place, label=name, clip_on=False)
    axes.set_ylabel("loss (nats per\nsupervised token)")
    axes.grid()
    if len(losses) or len(reference):
        axes.legend(loc="best")


def _draw_difference(axes: Axes, curve: LossCurve) -> None:
    shared = min(len(curve.losses), len(curve.reference_losses))
    losses, reference = _finite(curve.losses[:shared]), _finite(curve.reference_losses[:shared])
    difference, steps = losses - reference, _steps(losses, curve)
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
        return _note(axes, f"losses bit-identical at {'the only step' if shared == 1 else f'all {shared} steps'}", GOOD)
    sigma = _finite(curve.noise_sigma[:shared])
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


def _steps(values: np.ndarray, curve: LossCurve) -> np.ndarray:
    return np.arange(curve.first, curve.first + len(values))
