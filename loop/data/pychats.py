"""Conversations about the Python documentation: real text, many short ones and a long tail, half of it questions."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Callable, Iterator, Sequence

from loop.data.pydocs import Passage, passages
from loop.data.reading import Message

CHARS_PER_TOKEN = 2.2  # what hardly any passage goes below, so that hardly any conversation is too long for its pack
MEDIAN_CHARS, SPREAD = 420.0, 1.0  # of the log-normal distribution of a section's length
SHORTEST_CHARS = 60

ASK = (
    "What does `{name}` do?",
    "Explain `{name}`.",
    "What is `{name}` for?",
    "`{name}`: what should I know about it?",
    "Describe `{name}` in Python.",
)
ASK_HEADER = (
    "What does this do?\n\n{code}",
    "I found this in the standard library:\n\n{code}\n\nWhat is it for?",
    "`{name}` is declared like this:\n\n{code}\n\nExplain it.",
)
ASK_BODY = (
    "Write the docstring of `{name}`:\n\n{code}",
    "What does this function do?\n\n{code}",
    "Document this code from the standard library.\n\n{code}",
)
ASK_TOPIC = (
    "What does the Python reference say about {name}?",
    "Explain the topic `{name}`.",
    "I would like to read about {name} in Python.",
)
ASK_NEXT = (
    "The text on {name} says:\n\n{previous}\n\nWhat comes next?",
    "I have read this part about {name}:\n\n{previous}\n\nPlease continue.",
    "{previous}\n\nHow does this go on?",
)
GO_ON = ("Go on.", "And then?", "Please continue.", "What else?")
SYSTEM = ("You answer from the Python documentation.", "You are a Python expert. Be exact.")


def chats(max_tokens: int) -> list[list[Message]]:
    """Conversations that fit about `max_tokens` tokens each, in a fixed shuffled order: a function of the interpreter's
    documentation and `max_tokens` alone."""
    limit = int(max_tokens * CHARS_PER_TOKEN)
    told = []
    for group in _groups(passages()):
        rng = random.Random(f"{group[0].kind} {group[0].name}")
        told.extend(
            _long_chats(group[0], rng, limit) if len(group) == 1 and _is_long(group[0]) else _chats(group, rng, limit)
        )
    kept = [_with_system(chat) for chat in told if _chars(chat) <= limit and all(turn["content"].strip() for turn in chat)]
    random.Random(0).shuffle(kept)
    return kept


def _groups(found: Sequence[Passage]) -> Iterator[list[Passage]]:
    """Passages one at a time; some classes stay together with a few of their methods, for more turns than one."""
    group: list[Passage] = []
    for passage in found:
        if group and passage.owner == group[0].name and len(group) <= random.Random(group[0].name).choice((0, 1, 3, 6)):
            group.append(passage)
            continue
        if group:
            yield group
        group = [passage]
    if group:
        yield group


def _is_long(passage: Passage) -> bool:
    return passage.kind in ("topic", "module") or len(passage.text) > 4 * MEDIAN_CHARS


def _chats(group: Sequence[Passage], rng: random.Random, limit: int) -> Iterator[list[Message]]:
    """One conversation with a question for each passage; a new one begins where the next does not fit."""
    chat: list[Message] = []
    for passage in group:
        turns = _turns(_question(passage, rng, limit // 2), _sections(passage.text, lambda: limit // 2)[0])
        if chat and _chars(chat) + _chars(turns) > limit:
            yield chat
            chat = []
        chat = chat + turns
    yield chat


def _long_chats(passage: Passage, rng: random.Random, limit: int) -> Iterator[list[Message]]:
    """A text in sections of many lengths: each told from its title, or after the section before it, or turn by turn."""
    largest = max(SHORTEST_CHARS, int(limit * 0.8))

    def draw() -> int:
        return int(min(largest, max(SHORTEST_CHARS, rng.lognormvariate(0.0, SPREAD) * MEDIAN_CHARS)))

    previous = ""
    chat: list[Message] = []
    for section in _sections(passage.text, draw):
        follow = _turns(rng.choice(GO_ON), section)
        if chat and rng.random() < 0.3 and _chars(chat) + _chars(follow) <= limit:
            chat += follow
        else:
            if chat:
                yield chat
            room = limit - len(section) - 2 * SHORTEST_CHARS
            ask = rng.choice(ASK_NEXT) if 0 < len(previous) <= room else rng.choice(ASK_TOPIC)
            chat = _turns(ask.format(name=passage.name, previous=previous), section)
        previous = section
    if chat:
        yield chat


def _question(passage: Passage, rng: random.Random, room: int) -> str:
    """A question that shows nothing, the declaration or the code, as far as `room` characters allow."""
    forms: list[tuple[tuple[str, ...], str]] = [(ASK, "")]
    if passage.header:
        forms.append((ASK_HEADER, passage.header))
    if passage.body:
        forms.append((ASK_BODY, f"{passage.header}\n{passage.body}"))
    weights = (1, 2, 2)[: len(forms)]
    asks, code = rng.choices(forms, weights)[0]
    if len(code) > room:
        asks, code = ASK, ""
    return rng.choice(asks).format(name=passage.name, code=f"```python\n{code}\n```")


def _sections(text: str, draw: Callable[[], int]) -> list[str]:
    """The text in order, cut between paragraphs; only what is longer than a section is cut inside.

    draw: gives the greatest length of the next section in characters.
    """
    sections: list[str] = []
    current, limit = "", draw()
    for paragraph in text.split("\n\n"):
        joined = f"{current}\n\n{paragraph}" if current else paragraph
        if len(joined) <= limit:
            current = joined
            continue
        if current.strip():
            sections.append(current.strip("\n"))
            limit = draw()
        *whole, current = _pieces(paragraph, limit)
        sections.extend(whole)
    if current.strip():
        sections.append(current.strip("\n"))
    return sections


def _pieces(paragraph: str, limit: int) -> list[str]:
    """Runs of lines of at most `limit` characters; a longer line is cut where it has to be."""
    pieces = [""]
    for line in paragraph.split("\n"):
        for part in [line[i : i + limit] for i in range(0, len(line), limit)] or [""]:
            joined = f"{pieces[-1]}\n{part}" if pieces[-1] else part
            if len(joined) <= limit:
                pieces[-1] = joined
            else:
                pieces.append(part)
    return pieces


def _turns(question: str, answer: str) -> list[Message]:
    # A reply's leading spaces would share a token with the newline of its header, which is not supervised.
    return [{"role": "user", "content": question}, {"role": "assistant", "content": textwrap.dedent(answer).strip()}]


def _with_system(chat: list[Message]) -> list[Message]:
    """One conversation in eight has a system turn."""
    rng = random.Random(chat[-1]["content"])
    return [{"role": "system", "content": rng.choice(SYSTEM)}, *chat] if rng.random() < 1 / 8 else chat


def _chars(chat: Sequence[Message]) -> int:
    return sum(len(turn["content"]) for turn in chat)
