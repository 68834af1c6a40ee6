"""A conversation as its chat template writes it, and which characters of it the assistant wrote.

Templates with {% generation %} markers say it themselves. For the others, each assistant turn is found by rendering the
conversation a second time with that turn's text replaced by a placeholder: what is the same before and after it is the
template's, and what differs is the turn's, whatever the template strips, moves or adds. A turn's supervised text begins
where the template's own generation prompt ends (so that an empty <think></think> block that the model has to write is
supervised, and one that the prompt already holds is not) and ends with its end-of-turn token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError

from loop.data.masking import Span
from loop.data.reading import BadLine, Message
from loop.errors import UserError

GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
PLACEHOLDER = re.compile(r"qzTurn\d+zq")
# What a template may raise: its own raise_exception, and Python's errors for an expression that does not fit.
RENDER_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)


class Frame(NamedTuple):
    """The template's text around one assistant turn, for given roles; no message's text is in it."""

    before: str  # from the previous message's text to this turn's
    ends: tuple[str, ...]  # end-of-turn texts that may stand behind it; some templates end the last turn in another way


def chat_template_of(tokenizer: Any) -> str:
    """The template that conversations are written with. Raises UserError for a tokenizer that cannot be used here."""
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"the tokenizer of {name} has no character offsets; a fast tokenizer (tokenizer.json) is needed")
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        problem = f"the tokenizer of {name} has no chat template"
        raise UserError(f"{problem}; use an instruct model's tokenizer, or add chat_template.jinja to its folder") from None


class ChatRenderer:
    """Renders conversations with one tokenizer's chat template. Raises UserError when the tokenizer cannot be used."""

    def __init__(self, tokenizer: Any) -> None:
        self.template = chat_template_of(tokenizer)
        self.tokenizer = tokenizer
        self.marked = bool(GENERATION_MARKER.search(self.template))
        self.folds_system = self._folds_system()
        self.generation_prompt = self._generation_prompt()
        self._specials = _special_run(tokenizer)
        self._frames: dict[tuple[str, ...], dict[int, Frame]] = {}

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as text. Raises BadLine when the template refuses it."""
        messages = self._prepare(messages)
        return self._render(messages)

    def render_spans(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The conversation as text, and the assistant's spans. Raises BadLine when they cannot be told exactly."""
        messages = self._prepare(messages)
        text, spans = self._marked_spans(messages) if self.marked else self._found_spans(messages)
        if any(later.start < earlier.end for earlier, later in pairwise(spans)):
            raise BadLine("unclear_spans", "the chat template writes assistant turns that overlap or change places")
        return text, spans

    def _prepare(self, messages: Sequence[Message]) -> list[Message]:
        """A template without a system role gets the system text in front of the first user turn."""
        if not (self.folds_system and len(messages) > 1 and messages[0]["role"] == "system"):
            return list(messages)
        system, first, *rest = messages
        if first["role"] != "user":
            raise BadLine("template", "the chat template has no system role, and no user turn follows the system turn")
        return [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *rest]

    def _render(self, messages: Sequence[Message], **options: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
        except RENDER_ERRORS as error:
            roles = ", ".join(message["role"] for message in messages[:8])
            raise BadLine("template", f"the chat template refuses the turns ({roles}): {error}") from None

    def _folds_system(self) -> bool:
        """Whether the template takes user and assistant but refuses or drops a system turn."""
        turns = _placeholders(("system", "user", "assistant"))
        try:
            self._render(turns[1:])
        except BadLine:
            return False  # broken for other reasons, which each example will tell
        try:
            return turns[0]["content"] not in self._render(turns)
        except BadLine:
            return True

    def _generation_prompt(self) -> str:
        """What the template adds to ask for a reply; "" where that is nothing, or not a plain addition."""
        turns = _placeholders(("user",))
        try:
            asked, plain = self._render(turns, add_generation_prompt=True), self._render(turns)
        except BadLine:
            return ""
        prompt = asked[len(plain) :] if asked.startswith(plain) else ""
        return prompt if prompt.strip() else ""

    def _marked_spans(self, messages: list[Message]) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        # Characters, not apply_chat_template's assistant_masks: where a span starts with a character that the tokenizer
        # trims from its offsets, those masks lose the rest of the turns without a word.
        options = self.tokenizer.special_tokens_map
        try:
            texts, marks = render_jinja_template(
                conversations=[messages], chat_template=self.template, return_assistant_tokens_mask=True, **options
            )
        except RENDER_ERRORS as error:
            raise BadLine("template", f"the chat template refuses the turns: {error}") from None
        spans = [Span(start, end) for start, end in marks[0] if end > start]
        marked = "".join(texts[0][span.start : span.end] for span in spans)
        replies = [message["content"] for message in messages if message["role"] == "assistant"]
        if not any(reply.split("</think>")[-1].strip() in marked for reply in replies if marked):
            raise BadLine("unclear_spans", "the template's {% generation %} markers do not hold the reply; move them to it")
        return texts[0], spans

    def _found_spans(self, messages: list[Message]) -> tuple[str, list[Span]]:
        text = self._render(messages)
        roles = tuple(message["role"] for message in messages)
        if roles not in self._frames:
            self._frames[roles] = {i: self._frame(roles, i) for i, role in enumerate(roles) if role == "assistant"}
        return text, [self._find_turn(text, messages, i, frame) for i, frame in self._frames[roles].items()]

    def _find_turn(self, text: str, messages: list[Message], index: int, frame: Frame) -> Span:
        placeholder = _unused_placeholder(text)
        replaced = [*messages[:index], {**messages[index], "content": placeholder}, *messages[index + 1 :]]
        other = self._render(replaced)
        if other.count(placeholder) != 1:
            problem = f"the chat template writes turn {index + 1} (assistant) {other.count(placeholder)} times"
            raise BadLine("unclear_spans", f"{problem}; exactly once is needed to tell which tokens to train on")
        before, after = other.split(placeholder)
        if not text.endswith(after):
            raise BadLine("unclear_spans", f"the chat template's text behind turn {index + 1} depends on what the turn says")
        plain = text.startswith(before)
        same = len(before) if plain else _common_prefix(text, before)
        end = len(text) - len(after)
        start = self._turn_start(before, frame.before, same)
        if start is None:
            raise BadLine("unclear_spans", f"the chat template's text before turn {index + 1} depends on what the turn says")
        if not text[len(before) if plain else start : end].strip():
            raise BadLine("empty_assistant_turn", f"the chat template leaves nothing of turn {index + 1} (assistant)")
        end += next((len(ending) for ending in frame.ends if text.startswith(ending, end)), 0)
        return Span(start, end)

    def _turn_start(self, before: str, frame_before: str, same: int) -> int | None:
        """Where the supervised text of a turn begins; None when that cannot be told.

        before: the rendered text up to the placeholder. same: characters it shares with the true text.
        """
        prompt = self.generation_prompt
        header = frame_before.rfind(prompt) if prompt and before.endswith(frame_before) else -1
        if header < 0:
            return len(before) if same >= len(before) else None
        header += len(before) - len(frame_before)
        if same <= header:
            return None
        # A prompt may end in an empty <think> block that the turn's own reasoning replaces: then only what they share.
        return min(header + len(prompt), same)

    def _frame(self, roles: tuple[str, ...], index: int) -> Frame:
        """The template's text around turn `index`, an assistant's."""
        before, after = self._around(roles[: index + 1], index)
        ends = [self._end_of_turn(after)]
        if roles[index + 1 : index + 2] == ("user",):
            _, between = self._around(roles[: index + 2], index)
            header, _ = self._around(("user",), 0)
            ends.append(self._end_of_turn(between[: len(between) - _common_prefix(between[::-1], header[::-1])]))
        return Frame(before, tuple(ending for ending in ends if ending))

    def _around(self, roles: tuple[str, ...], index: int) -> tuple[str, str]:
        """The template's text from the message before to message `index`, and from there to the message behind it."""
        text = self._render(_placeholders(roles))
        pieces = PLACEHOLDER.split(text)
        names = PLACEHOLDER.findall(text)
        if names.count(_placeholder(index)) != 1:
            raise BadLine("unclear_spans", f"the chat template does not write turn {index + 1} exactly once")
        place = names.index(_placeholder(index))
        return pieces[place], pieces[place + 1]

    def _end_of_turn(self, tail: str) -> str:
        """The end-of-turn token, or the words that stand for one, at the beginning of the text behind a turn."""
        special = self._specials.match(tail)
        return special.group() if special else tail.rstrip()


def _placeholder(number: int) -> str:
    return f"qzTurn{number}zq"


def _placeholders(roles: Sequence[str]) -> list[Message]:
    return [{"role": role, "content": _placeholder(index)} for index, role in enumerate(roles)]


def _unused_placeholder(text: str) -> str:
    number = 0
    while _placeholder(number) in text:
        number += 1
    return _placeholder(number)


def _common_prefix(a: str, b: str) -> int:
    """How many characters two texts that differ share at their beginning."""
    return next((i for i, (left, right) in enumerate(zip(a, b, strict=False)) if left != right), min(len(a), len(b)))


def _special_run(tokenizer: Any) -> re.Pattern[str]:
    """White space, then one or more special tokens without anything between them."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = sorted(added | set(tokenizer.all_special_tokens), key=lambda name: (-len(name), name))
    return re.compile(rf"\s*(?:{'|'.join(map(re.escape, names))})+" if names else r"(?!)")
