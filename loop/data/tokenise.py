"""Conversations to token ids and supervision, in flat arrays that a cache file can hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loop.data.masking import Span, token_mask
from loop.data.reading import BadExample, BadLine, Example
from loop.data.template import ChatRenderer

TEXTS_AT_ONCE = 256  # character offsets of this many texts are in memory together


@dataclass(frozen=True)
class Tokenised:
    """N documents of T tokens in all.

    ids [T] int32; supervised [T] bool, whether a token is to be learned; bounds [N + 1] int64, where documents begin and
    end in them; lines [N] int64, the line each came from. bad: the examples that became no document.
    """

    ids: np.ndarray
    supervised: np.ndarray
    bounds: np.ndarray
    lines: np.ndarray
    bad: tuple[BadExample, ...]

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.bounds)


def tokenise(examples: Sequence[Example], bad: Sequence[BadExample], tokenizer: Any, supervise: str) -> Tokenised:
    """Render with the tokenizer's chat template and tokenise; what cannot be trained on joins `bad`.

    supervise: "assistant", the tokens that the assistant wrote, or "all". Raises UserError when the tokenizer has no chat
    template or gives no character offsets.
    """
    renderer = ChatRenderer(tokenizer)
    bad = list(bad)
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    lines: list[int] = []
    for start in range(0, len(examples), TEXTS_AT_ONCE):
        rendered = _render(examples[start : start + TEXTS_AT_ONCE], renderer, supervise, bad)
        for line, tokens, mask in _encode(rendered, tokenizer, bad):
            if not mask[1:].any():  # nothing predicts the first token
                bad.append(BadExample(line, "nothing_supervised", "has no token to train on; a longer reply is needed"))
                continue
            ids.append(tokens)
            masks.append(mask)
            lines.append(line)
    return Tokenised(
        ids=np.concatenate(ids) if ids else np.zeros(0, np.int32),
        supervised=np.concatenate(masks) if masks else np.zeros(0, bool),
        bounds=np.cumsum([0, *map(len, ids)], dtype=np.int64),
        lines=np.asarray(lines, dtype=np.int64),
        bad=tuple(sorted(bad, key=lambda example: example.line)),
    )


Rendered = tuple[int, str, list[Span] | None]  # line, text, assistant spans; None: every token is supervised


def _render(examples: Sequence[Example], renderer: ChatRenderer, supervise: str, bad: list[BadExample]) -> list[Rendered]:
    rendered: list[Rendered] = []
    for example in examples:
        try:
            if supervise == "all":
                rendered.append((example.line, renderer.render(example.messages), None))
            else:
                rendered.append((example.line, *renderer.render_spans(example.messages)))
        except BadLine as error:
            bad.append(error.at(example.line))
    return rendered


def _encode(
    rendered: Sequence[Rendered], tokenizer: Any, bad: list[BadExample]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(line, ids [T] int32, supervised [T] bool) of each text. The template writes its special tokens itself."""
    if not rendered:
        return
    encoded = tokenizer(
        [text for _, text, _ in rendered],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        truncation=False,
        padding=False,
        verbose=False,
    )
    for (line, text, spans), tokens, offsets in zip(rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        try:
            mask = np.ones(len(tokens), dtype=bool) if spans is None else token_mask(text, offsets, spans)
        except BadLine as error:
            bad.append(error.at(line))
            continue
        yield line, np.asarray(tokens, dtype=np.int32), mask
