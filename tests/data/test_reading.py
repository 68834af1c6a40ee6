"""Formats, bad lines, and what each error says."""

from __future__ import annotations

import json
import os

import pytest

from loop.data import load_dataset
from loop.data.reading import parse_examples
from loop.errors import UserError

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
ALPACA = {"instruction": "Add.", "input": "2 2", "output": "4"}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}


def chat(*turns: tuple[str, object]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def parsed(*lines: object) -> list[list[tuple[str, str]]]:
    examples, bad = parse_examples("\n".join(json.dumps(line) for line in lines).encode())
    assert bad == []
    return [[(turn["role"], turn["content"]) for turn in example.messages] for example in examples]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (CHAT, [("user", "Hi"), ("assistant", "Hello")]),
        (ALPACA, [("user", "Add.\n\n2 2"), ("assistant", "4")]),
        ({"instruction": "Add.", "output": "4"}, [("user", "Add."), ("assistant", "4")]),
        ({"instruction": "Add.", "input": "", "output": "4", "id": 3}, [("user", "Add."), ("assistant", "4")]),
        ({"instruction": "Add.", "input": None, "output": "4"}, [("user", "Add."), ("assistant", "4")]),
        ({**ALPACA, "system": "Be."}, [("system", "Be."), ("user", "Add.\n\n2 2"), ("assistant", "4")]),
        (SHAREGPT, [("user", "Hi"), ("assistant", "Hello")]),
        ({**SHAREGPT, "system": "Be.", "messages": None}, [("system", "Be."), ("user", "Hi"), ("assistant", "Hello")]),
        (
            {"conversations": [{"role": "user", "content": "u"}, {"from": "chatgpt", "value": "a"}]},
            [("user", "u"), ("assistant", "a")],
        ),
        (chat(("system", ""), ("user", ""), ("assistant", "a")), [("system", ""), ("user", ""), ("assistant", "a")]),
    ],
)  # fmt: skip
def test_formats_are_recognised_by_their_keys(line, expected):
    assert parsed(line) == [expected]


def test_every_line_is_recognised_on_its_own():
    assert [turns[-1][1] for turns in parsed(CHAT, ALPACA, SHAREGPT)] == ["Hello", "4", "Hello"]


def test_bom_crlf_blank_lines_line_separators_and_no_last_newline():
    line = json.dumps({"instruction": "a\u2028b", "output": "ü\x0c"}, ensure_ascii=False).encode()
    examples, bad = parse_examples(b"\xef\xbb\xbf" + line + b"\r\n\r\n   \n\n" + line)
    assert bad == []
    assert [example.line for example in examples] == [1, 5]
    assert examples[1].messages[0]["content"] == "a\u2028b"


def test_max_examples_counts_from_the_start_without_blank_lines():
    examples, bad = parse_examples(b"\n".join([json.dumps(CHAT).encode(), b"", b"oops", b"oops"]), max_examples=2)
    assert (len(examples), [example.line for example in bad]) == (1, [3])


BAD_LINES = [
    ("{oops", "malformed_json", "is not JSON"),
    ("[", "malformed_json", "not one array or object over several lines"),
    ("[" * 100_000, "malformed_json", "not usable JSON"),
    ('{"messages": ' + "9" * 6000 + "}", "malformed_json", "not usable JSON"),
    ([CHAT], "not_an_object", "JSON array"),
    ("3", "not_an_object", "JSON number"),
    ("null", "not_an_object", "JSON null"),
    ("true", "not_an_object", "JSON boolean"),
    ({"prompt": "a", "completion": "b"}, "unrecognised_keys", "'prompt', 'completion'"),
    ({}, "unrecognised_keys", "the keys none"),
    ({"instruction": "a"}, "no_assistant_turn", "no 'output'"),
    ({"messages": []}, "no_assistant_turn", "empty list"),
    (chat(("user", "a")), "no_assistant_turn", "no assistant turn"),
    (chat(("user", "a"), ("assistant", " \n")), "empty_assistant_turn", "turn 2"),
    ({"instruction": "a", "output": ""}, "empty_assistant_turn", "turn 2"),
    ({"messages": {"role": "user"}}, "bad_turns", "JSON object"),
    ({"messages": "hi"}, "bad_turns", "JSON string"),
    ({"messages": ["hi"]}, "bad_turns", "turn 1 is a JSON string"),
    ({"messages": [{"role": "user"}]}, "bad_turns", "no 'content'"),
    ({"conversations": [{"value": "a"}]}, "bad_turns", "no 'from'"),
    (chat(("user", None), ("assistant", "b")), "non_string_content", "JSON null"),
    (chat(("user", "a"), ("assistant", 4.5)), "non_string_content", "JSON number"),
    (chat(("user", [{"type": "text", "text": "a"}]), ("assistant", "b")), "non_string_content", "list of parts"),
    ({"instruction": 3, "output": "b"}, "non_string_content", "'instruction'"),
    ({"instruction": "a", "input": {}, "output": "b"}, "non_string_content", "'input'"),
    (chat(("robot", "a"), ("assistant", "b")), "unknown_role", "'robot'"),
    (chat((["user"], "a"), ("assistant", "b")), "unknown_role", "must be one of system, user, assistant, tool"),
    ({"conversations": [{"from": "alien", "value": "a"}]}, "unknown_role", "'alien'"),
    ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [1]}]}, "unsupported_field", "tool_calls"),
    ({"messages": [{"role": "assistant", "content": "a", "weight": 0}]}, "unsupported_field", "weight"),
    ({**CHAT, "tools": [{"name": "f"}]}, "unsupported_field", "tools"),
    ('{"instruction": "\\ud83d", "output": "b"}', "invalid_unicode", "surrogate"),
    (b'{"instruction": "caf\xe9", "output": "b"}', "not_utf8", "byte 0xe9 at position 21"),
    (chat(("user", "a"), ("assistant", "b " * 300)), "too_long", "tokens long, the pack holds 256"),
]


@pytest.mark.parametrize(("line", "reason", "says"), BAD_LINES)
def test_a_bad_line_stops_with_file_and_line_or_is_counted(make_tokenizer, write, config, line, reason, says):
    path = write(CHAT, "", line, ALPACA)
    with pytest.raises(UserError) as error:
        load_dataset(config(path), make_tokenizer(), seed=0)
    message = str(error.value)
    assert message.startswith(f"{path}:3: ")
    assert says in message
    assert "--on-bad-example skip" in message
    assert "\n" not in message and len(message) < 500
    dataset = load_dataset(config(path, on_bad_example="skip"), make_tokenizer(), seed=0)
    assert dataset.skipped == dataset.statistics()["skipped"] == {reason: 1}
    assert len(dataset.documents) == 2


def test_the_first_bad_line_is_named_and_the_others_are_counted(make_tokenizer, write, config):
    path = write(CHAT, chat(("user", "a"), ("assistant", "b " * 300)), "oops", {}, "oops", b"\xff")
    with pytest.raises(
        UserError, match=r"data\.jsonl:2: is 6\d\d tokens long.* 4 more bad lines: 2 malformed_json, 1 not_utf8, 1 unr"
    ):
        load_dataset(config(path), make_tokenizer(), seed=0)
    dataset = load_dataset(config(path, on_bad_example="skip"), make_tokenizer(), seed=0)
    assert dataset.skipped == {"malformed_json": 2, "not_utf8": 1, "too_long": 1, "unrecognised_keys": 1}


def test_a_pack_that_just_fits_is_not_too_long(make_tokenizer, write, config):
    path = write(CHAT)
    tokenizer = make_tokenizer()
    length = len(tokenizer.apply_chat_template(CHAT["messages"], return_dict=False))
    assert len(load_dataset(config(path, pack_length=length), tokenizer, seed=0).documents[0]) == length
    with pytest.raises(UserError, match=f"is {length} tokens long, the pack holds {length - 1}"):
        load_dataset(config(path, pack_length=length - 1), tokenizer, seed=0)


def test_template_problems_name_the_line(make_tokenizer, write, config):
    alternate = "{% if messages[0].role != 'user' %}{{ raise_exception('ask first') }}{% endif %}"
    template = make_tokenizer().chat_template
    path = write(CHAT, chat(("assistant", "a")))
    with pytest.raises(UserError, match=r"data\.jsonl:2: .*ask first"):
        load_dataset(config(path), make_tokenizer(alternate + template), seed=0)


def test_nothing_left_after_skipping_is_an_error(make_tokenizer, write, config):
    path = write("oops", "oops", {})
    with pytest.raises(UserError, match=r"data\.jsonl:1: .*2 more bad lines.*no good example is left"):
        load_dataset(config(path, on_bad_example="skip"), make_tokenizer(), seed=0)


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "is empty"), (b"\n \r\n\n", "is empty"), (b"\xef\xbb\xbf", "is empty"), ("{}".encode("utf-16"), ":1: is UTF-16")],
)
def test_files_without_examples(make_tokenizer, config, tmp_path, content, says, policy):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says):
        load_dataset(config(path, on_bad_example=policy), make_tokenizer(), seed=0)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_paths_that_are_no_file(make_tokenizer, config, tmp_path, policy):
    for path, says in ((tmp_path / "missing.jsonl", "no such file"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=says):
            load_dataset(config(path, on_bad_example=policy), make_tokenizer(), seed=0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file(make_tokenizer, write, config):
    path = write(CHAT)
    path.chmod(0)
    with pytest.raises(UserError, match="cannot be read"):
        load_dataset(config(path), make_tokenizer(), seed=0)


def test_path_through_a_file_is_one_line(make_tokenizer, write, config):
    with pytest.raises(UserError, match="cannot be read"):
        load_dataset(config(write(CHAT) / "inner.jsonl"), make_tokenizer(), seed=0)


@pytest.mark.parametrize("change", [{"pack_length": 1}, {"max_examples": 0}, {"max_examples": -3}])
def test_impossible_settings(make_tokenizer, write, config, change):
    with pytest.raises(UserError, match=next(iter(change))):
        load_dataset(config(write(CHAT), **change), make_tokenizer(), seed=0)


def test_a_tokenizer_without_a_template_is_one_line(make_tokenizer, write, config):
    with pytest.raises(UserError, match="has no chat template"):
        load_dataset(config(write(CHAT)), make_tokenizer(None), seed=0)
