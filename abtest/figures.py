"""Figures as PNG bytes that depend on the numbers alone.

Why PNG: every viewer shows it, and it is what people paste. Why its bytes repeat: matplotlib's Agg canvas is used without
pyplot, every setting is reset to matplotlib's defaults first, the font is the DejaVu that matplotlib carries, and the
Software, version and date entries are left out. What may still differ between machines is how the image library compresses
the same pixels, so each PNG also holds a digest of the numbers it shows, and `same_image` compares digest and pixels.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from PIL import Image, UnidentifiedImageError

from abtest.markdown import one_line

DIGEST = "isoloss records"  # the PNG text entry that marks our files
PIXEL_TOLERANCE = 24  # of 255: what another rounding in antialiasing may change
REFERENCE, CANDIDATE, ALARM, BAND, GOOD = "#a6c8ea", "#0b2a4a", "#c0392b", "#dfeee0", "#2e7d4f"
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


def label(words: str, longest: int) -> str:
    """Text for a figure: one line, at most `longest` characters, "?" for what DejaVu Sans can't draw."""
    words = one_line(words)
    words = words if len(words) <= longest else words[: longest - 1] + "…"
    glyphs = get_font(findfont("DejaVu Sans")).get_charmap()
    return "".join(char if ord(char) in glyphs else "?" for char in words)


def png(draw: Callable[[Figure], None], size: tuple[float, float], shown: list[str]) -> bytes:
    """What `draw` puts on a figure of `size` inches, as PNG; `shown` is every number and word that it shows."""
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
