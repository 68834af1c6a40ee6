"""Chat examples from a JSONL file, one line at a time; every line that is wrong is named instead of lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loop.errors import UserError

Message = dict[str, str]  # {"role": ..., "content": ...}

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
}
EXPECTED = '{"messages": [...]} (chat), {"instruction", "output"} (Alpaca) or {"conversations": [...]} (ShareGPT)'
# Fields that change what a turn says or whether it is trained on; dropping one in silence would train on something else.
UNSUPPORTED_IN_MESSAGE = ("tool_calls", "function_call", "reasoning_content", "thinking", "reasoning")
UNSUPPORTED_IN_EXAMPLE = ("tools", "functions", "history")


@dataclass(frozen=True)
class Example:
    """One conversation. line counts from 1."""

    line: int
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class BadExample:
    """A line that cannot be trained on. reason is a short key for counting; problem is for people, in one line."""

    line: int
    reason: str
    problem: str


class BadLine(ValueError):
    """Raised while one example is read or rendered; becomes a BadExample."""

    def __init__(self, reason: str, problem: str) -> None:
        super().__init__(problem)
        self.reason, self.problem = reason, " ".join(problem.split())

    def at(self, line: int) -> BadExample:
        return BadExample(line, self.reason, self.problem)


def read_bytes(path: Path) -> bytes:
    """The file's bytes. Raises UserError when the path is missing, a folder, unreadable or empty."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; the data path must be a JSONL file")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the data path must be a JSONL file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); the data path must be a readable JSONL file") from None
    if not data.removeprefix(b"\xef\xbb\xbf").strip():
        raise UserError(f"{path}: is empty; each line must be {EXPECTED}")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}:1: is UTF-16, not UTF-8; save the file as UTF-8")
    return data


def parse_examples(data: bytes, max_examples: int | None = None) -> tuple[list[Example], list[BadExample]]:
    """Good and bad examples of a JSONL file's bytes, each line recognised on its own.

    max_examples: read this many examples, good and bad together, from the start; None: all. Blank lines do not count.
    Lines end at a newline byte only, so that U+2028 inside a string does not cut it.
    """
    good: list[Example] = []
    bad: list[BadExample] = []
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        if max_examples is not None and len(good) + len(bad) >= max_examples:
            break
        try:
            good.append(Example(number, tuple(parse_line(raw))))
        except BadLine as error:
            bad.append(error.at(number))
    return good, bad


def parse_line(raw: bytes) -> list[Message]:
    """The messages of one line. Raises BadLine with what is wrong and what would be right."""
    record = _decode(raw)
    if not isinstance(record, dict):
        raise BadLine("not_an_object", f"is a JSON {_kind(record)}, not an object; write {EXPECTED}, one a line")
    for key in UNSUPPORTED_IN_EXAMPLE:
        if record.get(key):
            raise BadLine("unsupported_field", f"{key!r} is not supported; write every turn into the conversation itself")
    messages = _recognise(record)(record)
    if not any(message["role"] == "assistant" for message in messages):
        raise BadLine("no_assistant_turn", "has no assistant turn; at least one is needed to train on")
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and not message["content"].strip():
            raise BadLine("empty_assistant_turn", f"turn {index + 1} (assistant) is empty; write the reply or drop the turn")
    return messages


def _decode(raw: bytes) -> Any:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 (byte 0x{raw[error.start]:02x} at position {error.start + 1} of the line)"
        raise BadLine("not_utf8", f"{problem}; save the file as UTF-8") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = "one JSON object a line is needed"
        if text.strip() in ("[", "{"):
            hint += ", not one array or object over several lines"
        raise BadLine("malformed_json", f"is not JSON: {error.msg} at column {error.colno}; {hint}") from None
    except (ValueError, RecursionError):  # numbers of thousands of digits, brackets nested thousands deep
        problem = "is not usable JSON: a number too long or brackets too deep; one JSON object a line is needed"
        raise BadLine("malformed_json", problem) from None


def _recognise(record: dict[str, Any]) -> Callable[[dict[str, Any]], list[Message]]:
    if record.get("messages") is not None:
        return _from_chat
    if record.get("conversations") is not None:
        return _from_sharegpt
    if record.get("instruction") is not None:
        return _from_alpaca
    keys = ", ".join(repr(key[:40]) for key in list(record)[:8]) or "none"
    raise BadLine("unrecognised_keys", f"has the keys {keys}; expected {EXPECTED}")


def _from_chat(record: dict[str, Any]) -> list[Message]:
    return [
        _message(turn, index, role_keys=("role",), content_keys=("content",), roles=dict(zip(ROLES, ROLES, strict=True)))
        for index, turn in enumerate(_turns(record, "messages"))
    ]


def _from_sharegpt(record: dict[str, Any]) -> list[Message]:
    turns = [
        _message(turn, index, role_keys=("from", "role"), content_keys=("value", "content"), roles=SHAREGPT_ROLES)
        for index, turn in enumerate(_turns(record, "conversations"))
    ]
    return _system(record) + turns


def _from_alpaca(record: dict[str, Any]) -> list[Message]:
    if record.get("output") is None:
        raise BadLine("no_assistant_turn", "has 'instruction' but no 'output'; an Alpaca line needs the reply in 'output'")
    question = _text(record["instruction"], "'instruction'")
    context = "" if record.get("input") is None else _text(record["input"], "'input'")
    reply = _text(record["output"], "'output'")
    if context.strip():
        question = f"{question}\n\n{context}"
    return [*_system(record), {"role": "user", "content": question}, {"role": "assistant", "content": reply}]


def _system(record: dict[str, Any]) -> list[Message]:
    """A `system` field beside the turns, as Alpaca and ShareGPT files often have."""
    if record.get("system") is None:
        return []
    content = _text(record["system"], "'system'")
    return [{"role": "system", "content": content}] if content.strip() else []


def _turns(record: dict[str, Any], key: str) -> list[Any]:
    turns = record[key]
    if not isinstance(turns, list):
        raise BadLine("bad_turns", f"{key!r} is a JSON {_kind(turns)}; it must be a list of turns")
    if not turns:
        raise BadLine("no_assistant_turn", f"{key!r} is an empty list; at least one assistant turn is needed")
    return turns


def _message(
    turn: Any, index: int, *, role_keys: tuple[str, ...], content_keys: tuple[str, ...], roles: dict[str, str]
) -> Message:
    where = f"turn {index + 1}"
    if not isinstance(turn, dict):
        raise BadLine("bad_turns", f"{where} is a JSON {_kind(turn)}; it must be an object with {role_keys[0]!r}")
    for key in UNSUPPORTED_IN_MESSAGE:
        if turn.get(key):
            raise BadLine("unsupported_field", f"{where}: {key!r} is not supported; write its text into the turn's content")
    if turn.get("weight", 1) not in (1, None):
        raise BadLine(
            "unsupported_field", f"{where}: a 'weight' other than 1 is not supported; drop it or split the example"
        )
    role_key = next((key for key in role_keys if key in turn), None)
    content_key = next((key for key in content_keys if key in turn), None)
    if role_key is None or content_key is None:
        missing = role_keys[0] if role_key is None else content_keys[0]
        raise BadLine("bad_turns", f"{where} has no {missing!r}; a turn needs {role_keys[0]!r} and {content_keys[0]!r}")
    role = turn[role_key]
    if not isinstance(role, str) or role not in roles:
        raise BadLine("unknown_role", f"{where}: {role_key!r} is {_short(role)}; it must be one of {', '.join(roles)}")
    return {"role": roles[role], "content": _text(turn[content_key], f"{where} ({role}): {content_key!r}")}


def _text(value: Any, where: str) -> str:
    if isinstance(value, list):
        raise BadLine("non_string_content", f"{where} is a list of parts; it must be one string, the text parts joined")
    if not isinstance(value, str):
        raise BadLine("non_string_content", f"{where} is a JSON {_kind(value)}; it must be a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        problem = f"{where} holds half of a surrogate pair (an escape such as \\ud83d on its own); write the whole character"
        raise BadLine("invalid_unicode", problem) from None
    return value


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    return {dict: "object", list: "array", str: "string", int: "number", float: "number"}[type(value)]


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 40 else text[:37] + "..."
