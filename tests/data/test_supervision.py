"""Which tokens of a conversation are supervised, for many kinds of chat template."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loop.data.masking import Span, token_mask
from loop.data.reading import BadLine, Example
from loop.data.template import ChatRenderer
from loop.data.tokenise import tokenise
from loop.errors import UserError

# Chat templates of the families in use, written for these tests.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_STRIPPING = CHATML.replace("m.content", "m.content | trim")
CHATML_DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}" + CHATML
)
CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_MISTRAL = (
    "{{ '<s>' }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'user' %}{{ 'OPEN' + m.content + 'CLOSE' }}"
    "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
MISTRAL = _MISTRAL.replace("OPEN", "[INST] ").replace("CLOSE", " [/INST]")
MISTRAL_PLAIN_TEXT = _MISTRAL.replace("OPEN", "<<ASK>> ").replace("CLOSE", " <</ASK>>")  # no special tokens but </s>
GEMMA = (
    "{{ '<bos>' }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
SYSTEM_DROPPING = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
# Reasoning is cut out of every turn but those behind the last question, which always get a <think> block.
_THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% set c = m.content %}{% set r = '' %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}{% set c = c.split('</think>')[-1].lstrip('\n') %}"
    "{% endif %}{% if loop.index0 > ns.last %}{{ '<think>\n' + r + '\n</think>\n\n' + c.lstrip('\n') }}"
    "{% else %}{{ c }}{% endif %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'PROMPT' }}{% endif %}"
)
QWEN3 = _THINKING.replace("PROMPT", "<|im_start|>assistant\n")
QWEN35_NO_THINKING = _THINKING.replace("PROMPT", "<|im_start|>assistant\n<think>\n\n</think>\n\n")
PLAIN_WORDS = "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endfor %}"
OTHER_LAST_END = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>' + m.content }}"
    "{{ '<|endoftext|>' if loop.last and m.role == 'assistant' else '<|eot_id|>' }}{% endfor %}"
)
ROLES_ONLY = "{{ '<bos>' }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endfor %}"
GLUED = "{% for m in messages %}{{ ' bro' + m.content }}{% endfor %}"


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """user, assistant, user, assistant, ... with these contents."""
    roles = ("user", "assistant")
    chat = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return chat if system is None else [{"role": "system", "content": system}, *chat]


CHAT = turns("Hi", "Hello world!", "Two and two?", "It is four.")
REASONED = turns("Hi", "<think>\ngreet\n</think>\n\nHello", "Two?", "<think>\ncount\n</think>\n\nFour.")


def supervised(tokenizer, messages, supervise="assistant") -> list[str]:
    """The decoded runs of supervised tokens; fails when the conversation was refused."""
    found = tokenise([Example(1, tuple(messages))], [], tokenizer, supervise)
    assert found.bad == ()
    runs = groupby(zip(found.ids.tolist(), found.supervised.tolist(), strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run]) for is_supervised, run in runs if is_supervised]


def refused(tokenizer, messages) -> str:
    found = tokenise([Example(1, tuple(messages))], [], tokenizer, "assistant")
    assert len(found) == 0
    (bad,) = found.bad
    return f"{bad.reason}: {bad.problem}"


CASES = {
    "chatml": (CHATML, CHAT, ["Hello world!<|im_end|>", "It is four.<|im_end|>"]),
    "system": (CHATML, turns("a", "b", system="s"), ["b<|im_end|>"]),
    "keeps white space": (CHATML, turns("a", "  b c \n"), ["  b c \n<|im_end|>"]),
    "strips": (CHATML_STRIPPING, turns("a", "  b c \n", " d ", "\n\ne"), ["b c<|im_end|>", "e<|im_end|>"]),
    "default system": (CHATML_DEFAULT_SYSTEM, CHAT, ["Hello world!<|im_end|>", "It is four.<|im_end|>"]),
    "llama 3": (LLAMA3, turns("a", " b ", "c", "d", system="s"), ["b<|eot_id|>", "d<|eot_id|>"]),
    "mistral": (MISTRAL, CHAT, [" Hello world!</s>", " It is four.</s>"]),
    "mistral in plain text": (MISTRAL_PLAIN_TEXT, CHAT, [" Hello world!</s>", " It is four.</s>"]),
    "gemma": (GEMMA, CHAT, ["Hello world!<end_of_turn>", "It is four.<end_of_turn>"]),
    "gemma, system folded": (GEMMA, turns("a", "b", system="s"), ["b<end_of_turn>"]),
    "generation markers": (CHATML_MARKED, CHAT, ["Hello world!<|im_end|>", "It is four.<|im_end|>"]),
    "markers, white space first": (CHATML_MARKED, turns("a", " b", "c", "  d"), [" b<|im_end|>", "  d<|im_end|>"]),
    # the prompt stops before the block, so the model has to write it
    "qwen 3": (QWEN3, CHAT, ["Hello world!<|im_end|>", "<think>\n\n</think>\n\nIt is four.<|im_end|>"]),
    "qwen 3, reasoning": (QWEN3, REASONED, ["Hello<|im_end|>", "<think>\ncount\n</think>\n\nFour.<|im_end|>"]),
    # the prompt holds the empty block, or the part of it that the reasoning leaves
    "qwen 3.5": (QWEN35_NO_THINKING, CHAT, ["Hello world!<|im_end|>", "It is four.<|im_end|>"]),
    "qwen 3.5, reasoning": (QWEN35_NO_THINKING, REASONED, ["Hello<|im_end|>", "count\n</think>\n\nFour.<|im_end|>"]),
    "no end of turn": (PLAIN_WORDS, CHAT, ["Hello world!", "It is four."]),
    "next header is no end of turn": (ROLES_ONLY, CHAT, ["Hello world!", "It is four."]),
    "last turn ends otherwise": (OTHER_LAST_END, CHAT, ["Hello world!<|eot_id|>", "It is four.<|endoftext|>"]),
    "question last": (CHATML, CHAT[:3], ["Hello world!<|im_end|>"]),
    "assistant first": (CHATML, CHAT[1:], ["Hello world!<|im_end|>", "It is four.<|im_end|>"]),
    "two replies": (CHATML, [*CHAT[:2], CHAT[3]], ["Hello world!<|im_end|>", "It is four.<|im_end|>"]),
    "same text everywhere": (CHATML, turns("a", "a", "a", "a"), ["a<|im_end|>", "a<|im_end|>"]),
    "template text in a turn": (
        CHATML,
        turns("<|im_start|>assistant\nno", "<|im_end|>\n<|im_start|>user\nyes", "no<|im_end|>", "ok"),
        ["<|im_end|>\n<|im_start|>user\nyes<|im_end|>", "ok<|im_end|>"],
    ),
    "placeholder in a turn": (CHATML, turns("qzTurn0zq", "qzTurn1zq", "c", "b"), ["qzTurn1zq<|im_end|>", "b<|im_end|>"]),
    "other scripts": (LLAMA3, turns("héllo 你好", "emoji 🙂 ñ你"), ["emoji 🙂 ñ你<|eot_id|>"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["byte_level", "trimmed"])
@pytest.mark.parametrize("case", CASES)
def test_supervised_text(make_tokenizer, case, kind):
    template, messages, expected = CASES[case]
    assert supervised(make_tokenizer(template, kind), messages) == expected


@pytest.mark.parametrize("case", ["chatml", "llama 3", "mistral", "gemma", "generation markers"])
def test_supervised_text_where_words_begin_with_a_metaspace(make_tokenizer, case):
    template, messages, expected = CASES[case]
    found = supervised(make_tokenizer(template, "metaspace"), messages)
    assert [text.split() for text in found] == [text.split() for text in expected]


@pytest.mark.parametrize("case", CASES)
def test_token_ids_are_those_of_apply_chat_template(make_tokenizer, case):
    template, messages, _ = CASES[case]
    tokenizer = make_tokenizer(template)
    if case == "gemma, system folded":
        messages = turns("s\n\na", "b")
    found = tokenise([Example(1, tuple(messages))], [], tokenizer, "assistant")
    assert found.ids.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)


def test_markers_give_the_mask_of_transformers(make_tokenizer):
    tokenizer = make_tokenizer(CHATML_MARKED)
    theirs = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    ours = tokenise([Example(1, tuple(CHAT))], [], tokenizer, "assistant")
    assert ours.supervised.tolist() == [bool(flag) for flag in theirs["assistant_masks"]]


def test_system_text_stays_where_a_template_drops_or_refuses_it(make_tokenizer):
    for template in (GEMMA, SYSTEM_DROPPING):
        renderer = ChatRenderer(make_tokenizer(template))
        assert renderer.folds_system
        assert "\nBe brief.\n\nHi<" in renderer.render(turns("Hi", "Hello", system="Be brief."))
    assert not ChatRenderer(make_tokenizer(LLAMA3)).folds_system


def test_supervise_all_takes_every_token(make_tokenizer):
    tokenizer = make_tokenizer(CHATML)
    assert supervised(tokenizer, CHAT, "all") == [tokenizer.apply_chat_template(CHAT, tokenize=False)]


contents = st.text(st.sampled_from("ab é你🙂\n \t.<|>"), max_size=12) | st.sampled_from(
    ["<|im_end|>", "<|im_start|>assistant\n", "a <|im_end|>\n", "assistant\nb", "qzTurn1zq", "</think>", "<think>"]
)
replies = contents.filter(str.strip)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(contents, replies), min_size=1, max_size=4), system=st.none() | contents)
def test_chatml_against_spans_written_out_by_hand(make_tokenizer, pairs, system):
    messages = turns(*(content for pair in pairs for content in pair), system=system)
    text, spans = "", []
    for message in messages:
        text += f"<|im_start|>{message['role']}\n"
        start = len(text)
        text += f"{message['content']}<|im_end|>"
        if message["role"] == "assistant":
            spans.append(Span(start, len(text)))
        text += "\n"
    for template in (CHATML, CHATML_MARKED):
        assert ChatRenderer(make_tokenizer(template)).render_spans(messages) == (text, spans)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    messages=st.lists(st.tuples(contents, replies), min_size=1, max_size=3).map(lambda p: turns(*(c for x in p for c in x)))
)
def test_no_template_ever_supervises_a_question(make_tokenizer, messages):
    """Questions are replaced by a word that no reply holds: it must never be supervised."""
    for message in messages[::2]:
        message["content"] = "QUESTION" + message["content"]
    for template in (CHATML, LLAMA3, MISTRAL, MISTRAL_PLAIN_TEXT, GEMMA, QWEN3, QWEN35_NO_THINKING):
        try:
            text, spans = ChatRenderer(make_tokenizer(template)).render_spans(messages)
        except BadLine:
            continue
        assert len(spans) == len(messages) // 2
        assert "QUESTION" not in "".join(text[span.start : span.end] for span in spans)


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (GLUED, turns("a", "wn fox"), "unclear_spans: the token ' brown' mixes"),
        ("{{ messages[0].content }}", CHAT, "does not write turn 2 exactly once"),
        ("{% for m in messages %}{{ m.content + m.content }}{% endfor %}", CHAT, "does not write turn 2 exactly once"),
        (
            CHATML_MARKED.replace("m.content }}<|im_end|>{% endgen", "m.text }}<|im_end|>{% endgen"),
            CHAT,
            "do not hold the reply",
        ),
        (
            "{% for m in messages %}{{ m.content | length }}{{ m.content }}{% endfor %}",
            CHAT,
            "depends on what the turn says",
        ),
        (
            "{% for m in messages %}{{ m.content }}{{ m.content | length }}{% endfor %}",
            CHAT,
            "depends on what the turn says",
        ),
        (CHATML_MARKED.replace("'assistant'", "'robot'"), CHAT, "do not hold the reply"),
        (QWEN3, turns("a", "<think>\nonly\n</think>", "b", "c"), "leaves nothing of turn 2"),
        (MISTRAL, [*CHAT[:2], CHAT[1]], "roles must alternate"),
        (GEMMA, [{"role": "system", "content": "s"}, CHAT[1]], "no user turn follows"),
        ("{% for m in messages %}{{ m.nothing.at_all }}{% endfor %}", CHAT, "template: the chat template refuses"),
        ("{% for m in messages %}{{ 1 + m.content }}{% endfor %}", CHAT, "template: the chat template refuses"),
    ],
)
def test_spans_that_cannot_be_told_are_refused(make_tokenizer, template, messages, expected):
    assert expected in refused(make_tokenizer(template), messages)


def test_a_tokenizer_without_template_or_offsets_is_an_error(make_tokenizer):
    with pytest.raises(UserError, match="no chat template"):
        ChatRenderer(make_tokenizer(None))
    with pytest.raises(UserError, match="no character offsets"):
        ChatRenderer(object())


def test_white_space_shared_with_the_header_is_the_headers():
    text = "user:\n\nhi"
    assert token_mask(text, [(0, 5), (5, 7), (7, 9)], [Span(6, 9)]).tolist() == [False, False, True]
    assert token_mask(text, [(0, 5), (5, 6), (6, 9)], [Span(7, 9)]).tolist() == [False, False, True]
    with pytest.raises(BadLine, match="mixes"):
        token_mask(text, [(0, 5), (5, 9)], [Span(3, 9)])
