"""A flame graph as SVG, from the tree of stacks in a record: outermost function at the top, as wide as its samples."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from abtest.markdown import MARK, one_line

WIDTH, ROW, LETTER = 1200, 17, 6.7  # pixels: of the drawing, of a function, of a letter
NARROWEST = 30  # a function that is narrower shows its name only where the mouse rests on it
OURS = ("loop/", "kernels/", "negative_results/", "abtest/", "bench/")
COLORS = (
    (OURS, "#8fa9c4"),
    (("torch/",), "#e0c084"),
    (("transformers/", "peft/"), "#cbbcc5"),
    (("triton/", "fla/"), "#a9c6ae"),
)
ELSEWHERE = "#d9dde3"
LEGEND = "Blue is this project's code, yellow PyTorch's, mauve transformers' and PEFT's, green Triton's and FLA's."


def flame(stacks: Mapping[str, Any], title: str) -> bytes:
    """The drawing of what `bench.profile.stacks.tree` returned."""
    nodes, frames, whole = stacks["nodes"], stacks["frames"], max(stacks["samples"], 1)
    scale = WIDTH / whole
    at = [0.0]  # by depth: where the next function begins
    shapes = []
    for depth, frame, samples in nodes:
        del at[depth + 1 :]
        left, width = at[depth], samples * scale
        at[depth] = left + width
        at.append(left)
        shapes.append(_shape(frames[frame], left, ROW * (depth + 2), width, samples, whole))
    height = ROW * (max((depth for depth, _, _ in nodes), default=-1) + 3)
    words = escape(one_line(f"{title}: {stacks['samples']} samples at {stacks['rate_hz']} Hz"))
    return "\n".join(
        [
            f"<!-- {MARK} -->",
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
            'font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="11">',
            f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
            f'<text x="4" y="{ROW - 4}" fill="#30343b">{words}</text>',
            *shapes,
            "</svg>\n",
        ]
    ).encode("utf-8", "replace")


def _shape(frame: str, left: float, top: int, width: float, samples: int, whole: int) -> str:
    said = escape(one_line(frame))
    box = f'<rect x="{left:.1f}" y="{top}" width="{max(width - 0.5, 0.2):.1f}" height="{ROW - 1}" fill="{_color(frame)}"/>'
    text = ""
    if width >= NARROWEST:
        shown = escape(_fitting(one_line(frame), int((width - 6) / LETTER)))
        text = f'<text x="{left + 3:.1f}" y="{top + ROW - 5}" fill="#20242b">{shown}</text>'
    return f"<g><title>{said}: {samples} samples, {100 * samples / whole:.1f} %</title>{box}{text}</g>"


def _fitting(frame: str, letters: int) -> str:
    name = frame if len(frame) <= letters else frame.rpartition(" (")[0] or frame
    return name if len(name) <= letters else name[: max(letters - 1, 1)] + "…"


def _color(frame: str) -> str:
    file = frame.rpartition(" (")[2]
    return next((color for packages, color in COLORS if file.startswith(packages)), ELSEWHERE)
