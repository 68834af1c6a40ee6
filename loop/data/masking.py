"""From spans of characters to a mask of tokens, or a refusal where a token sits on a span's edge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loop.data.reading import BadLine


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a rendered conversation that the assistant wrote."""

    start: int
    end: int


def token_mask(text: str, offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> np.ndarray:
    """[T] bool: tokens that hold characters of a span. `offsets` are the tokenizer's character ranges, one a token.

    A token on the edge of a span may hold white space from outside (" Hello" after "[/INST]"). Where it holds other
    characters from outside, nobody can say whether it is the assistant's: raises BadLine. A token of nothing but white
    space that begins in the header belongs to the header.
    """
    ranges = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    ends = ranges[:, 1]
    reached = np.concatenate(([0], np.maximum.accumulate(ends)[:-1])) if len(ends) else ends
    # Tokenizers that trim offsets leave white space out of them; a token begins where the one before it ended.
    starts = np.minimum(ranges[:, 0], reached)
    mask = np.zeros(len(ends), dtype=bool)
    for span in spans:
        inside = (starts < span.end) & ((ends > span.start) | ((starts == ends) & (starts >= span.start)))
        touched = np.flatnonzero(inside)
        if not len(touched):
            raise BadLine(
                "unclear_spans", "the tokenizer gives no token for an assistant turn; another chat template is needed"
            )
        first, last = int(touched[0]), int(touched[-1])
        _refuse_mixed(text[starts[first] : span.start], text[starts[first] : ends[first]])
        _refuse_mixed(text[span.end : ends[last]], text[starts[last] : ends[last]])
        if starts[first] < span.start and not text[span.start : ends[first]].strip():
            inside[first] = False
        mask |= inside
    return mask


def _refuse_mixed(outside: str, token: str) -> None:
    if outside.strip():
        problem = f"the token {token[:40]!a} mixes the assistant's text with the template's"
        raise BadLine("unclear_spans", f"{problem}; use a template with a special token or a newline there")
