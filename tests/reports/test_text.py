"""Markdown escapes and human numbers."""

from __future__ import annotations

import math

import pytest
import synthetic_records as synthetic
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from bench.report import text

MARKDOWN = MarkdownIt("commonmark").enable("table").enable("strikethrough")
WORDS = st.text(st.sampled_from("ab_*`|\\<>[]()!~&;# \n\r\t-\u2028é") | st.characters(), max_size=20)


def cells(markdown: str) -> list[str]:
    found = []
    for token in MARKDOWN.parse(markdown):
        if token.type == "inline":
            assert not {child.type for child in token.children or ()} - {"text", "code_inline", "text_special"}
            found.append("".join(child.content for child in token.children or ()))
    return found


@settings(max_examples=400, deadline=None)
@given(WORDS, WORDS)
@example("a|b", "`")
@example("\\|", "``|`")
@example("&amp;", "[x](http://y)")
@example("# 1", "")
@example("12) -", "")
@example("- - -", "")
@example("[a]: b", "")
def test_any_words_stay_in_their_cell_and_read_as_they_are(words, span):
    row = text.table(("a", "b"), [(f"x{text.prose(words)}x", text.code(span))])
    assert cells(row) == ["a", "b", f"x{text.one_line(words)}x", text.one_line(span) or " "]
    assert "".join(cells(f"- {text.prose(words)}")) == text.one_line(words)


@pytest.mark.parametrize(
    ("perf", "shown"),
    [
        ((1.23, 0.02), "1.23x [1.21, 1.25]"),
        ((1.003, 0.01), "1.003x [0.993, 1.013]"),
        ((1.0002, 0.0001), "1.0002x [1.0001, 1.0003]"),
        ((1.0, 0.0), "1.00x [1.00, 1.00]"),
        ((math.nan, 0.0), "nanx [nan, nan]"),
    ],
)
def test_a_ratio_has_the_decimals_that_tell_it_from_one(perf, shown):
    assert text.ratio(synthetic.perf(*perf)) == shown


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (text.per_second(1699.4, "tok/s"), "1,699 tok/s"),
        (text.per_second(12.345), "12.3"),
        (text.per_second(math.inf), "inf"),
        (text.memory(int(22.5 * 2**30)), "22.5 GiB"),
        (text.memory(300 * 2**20), "300 MiB"),
        (text.memory(None), "–"),
        (text.number(None), "–"),
        (text.number(6.0), "6"),
        (text.number(1234.0), "1,234"),
        (text.number(0.00012345), "0.000123"),
        (text.number(-math.inf), "-inf"),
        (text.percent(0.314), "31.4 %"),
        (text.scalar("total_bytes", 2**30), "1.0 GiB"),
        (text.scalar("matmul_flops_per_s", 6.712e14), "671.2 TFLOP/s"),
        (text.scalar("matmul_flops_per_s", 5e10), "50.0 GFLOP/s"),
        (text.scalar("copy_bytes_per_s", 4.1e12), "4,100.0 GB/s"),
        (text.facts({"copy_bytes_per_s": None}), "|  |  |\n| --- | --- |\n| copy rate | – |"),
        (text.scalar("versions", {"torch": "2.11", "a_b": None}), "torch: 2.11<br>a_b: –"),
        (text.scalar("capability", [9, 0]), "9, 0"),
        (text.scalar("git_dirty", True), "yes"),
        (text.scalar("documents", 12345), "12,345"),
    ],
)
def test_numbers_are_for_people(shown, expected):
    assert shown == expected


@settings(max_examples=200, deadline=None)
@given(WORDS)
def test_a_page_name_is_a_safe_file_name_of_its_own(arm):
    name = text.page_name(arm)
    assert name == arm or name.rpartition("-")[2].isalnum()
    assert name and not set(name) & set("/\\\0 \n") and not name.startswith(".") and name not in text.RESERVED


def test_page_names_do_not_collide():
    arms = ["a", "A", "a ", "a/b", "a-b", "../a", "readme", "README", "shipping", "overview", "", "x" * 300]
    assert len({text.page_name(arm).lower() for arm in arms}) == len(arms)
