"""The page of searches: rendered from trials alone, with the way to the answer and what each member of it is worth."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import synthetic_records as synthetic
from markdown_it import MarkdownIt
from rendered import tables
from synthetic_trials import forward, timing, trial, whole

from abtest import jsonl
from bench.report import differences, plots, render
from bench.search import trials
from bench.search.trials import FORWARD, LEAVE_ONE_OUT, Timing, Trial
from loop.errors import UserError

FOLDER = Path("search")
SLUG = "example-gpu-x1"
WEIRD = 'a|b\n<script> `c` "d" ](http://e) 漢字 **f** __g__'


def rendered(reports: Path, found: list[Trial]) -> str:
    for one in found:
        jsonl.append(trials.path_of(reports, one.environment["device_slug"]), jsonl.dumps(one))
    render(reports / "data", reports)
    return (reports / FOLDER / "README.md").read_text(encoding="utf-8")


def test_the_page_shows_the_answer_its_members_and_the_way_there(tmp_path):
    slower = timing(0.625, 0.01, peak_memory_bytes=3 << 30, against_peak_memory_bytes=2 << 30, launches=1234)
    text = rendered(tmp_path, whole(slower, Timing(why="b: needs c")))
    assert "> **`b` + `c`** is the fastest set.\n\nSearched among `a` + `b` + `c`." in text
    gains, path = tables(text)
    assert gains[1:] == [
        ["c", "–", "–", "–", "–", "–", "yes: without it the rest does not run: b: needs c"],
        ["b", "1.600x [1.575, 1.626]", "1,062", "3.0 GiB", "2.0 GiB", "1,234", "yes"],
    ]
    assert [row[0:1] + row[2:5] + row[6:] for row in path[1:]] == [
        ["1", "0", "+ a", "2.00x [1.98, 2.02]", "taken"],
        ["1", "0", "+ b", "1.50x [1.48, 1.52]", "faster"],
        ["2", "1", "+ b", "–", "b: needs c"],
        ["2", "1", "− a + c", "1.25x [1.23, 1.27]", "taken"],
        ["3", "1", "+ b", "1.60x [1.58, 1.62]", "taken"],
        ["4", "2", "− b", "0.62x [0.61, 0.64]", "slower"],
        ["4", "2", "− c", "–", "b: needs c"],
    ]
    assert "Run `r`, commit `0123abc`, finished 2026-01-02T03:04:05+00:00: `python -m bench.search`." in text
    assert "[Searches](search/README.md)" in (tmp_path / "README.md").read_text()
    (image,) = (tmp_path / FOLDER).glob("*.png")
    assert image.name == "example-gpu-x1-qwen3.5-tiny-lora-512-bfloat16.png" and image.name in text
    assert plots.is_ours(image.read_bytes())


@pytest.mark.parametrize(
    ("without", "words"),
    [
        (timing(1.1), "no: slower with it"),
        (timing(1.0), "no: it does nothing here"),
        (timing(1.0, peak_memory_bytes=1000, against_peak_memory_bytes=995), "no: it does nothing here"),
        (timing(1.0, peak_memory_bytes=1000, against_peak_memory_bytes=900), "yes: it saves memory"),
        (timing(1.1, peak_memory_bytes=1000, against_peak_memory_bytes=900), "no: slower with it"),
        (timing(0.9), "yes"),
    ],
)
def test_why_a_member_stays_or_goes(without, words, tmp_path):
    text = rendered(tmp_path, whole(without, timing(0.5)))
    gains, path = tables(text)
    assert {row[0]: row[6] for row in gains[1:]} == {"b": words, "c": "yes"}
    dropped = words.startswith("no")
    assert (path[-2][6] == "dropped") is dropped
    assert ("> **`c`** is the fastest set." in text) is dropped


def test_the_way_of_a_search_from_a_set_begins_there_also_after_one_from_stock(tmp_path):
    begun = [trial(FORWARD, 1, "b", "bc", timing(1.6)), *whole(timing(0.625), timing(0.5))[-2:]]
    alone, both = rendered(tmp_path / "alone", begun), rendered(tmp_path / "both", [*forward()[:3], *begun])
    for text in (alone, both):
        assert "![Time of a micro-step from the given set to the best set, step by step]" in text
        assert "> **`b` + `c`** is the fastest set." in text and tables(text)[-1][-3][6] == "taken"
    (image,), (other,) = ((tmp_path / name / FOLDER).glob("*.png") for name in ("alone", "both"))
    assert image.read_bytes() == other.read_bytes()


def test_a_search_that_was_cut_says_so(tmp_path):
    text = rendered(tmp_path, forward())
    assert "> **`c`** is the best set so far: the search has not come to its end. `--run r` goes on with it." in text
    half = rendered(tmp_path, [trial(LEAVE_ONE_OUT, 4, "bc", "c", timing(0.5))])
    assert "> **`b` + `c`** is the best set so far" in half and "What each member is worth" not in half


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([trial(FORWARD, 1, "", "a", timing(0.9))], "Nothing was clearly faster than stock"),
        (
            [trial(FORWARD, 1, "", "a", timing(1.2)), trial(LEAVE_ONE_OUT, 2, "a", "", timing(1.01))],
            "Nothing is faster than stock",
        ),
    ],
)
def test_where_nothing_pays(found, words, tmp_path):
    assert f"> **{words}**" in rendered(tmp_path, found)


def test_the_newest_search_of_each_setting_counts(tmp_path):
    full = synthetic.RECIPE | {"method": "full"}
    text = rendered(
        tmp_path,
        [
            trial(FORWARD, 1, "", "a", timing(3.0)),
            trial(FORWARD, 1, "", "b", timing(1.5), recipe=full),
            trial(FORWARD, 1, "", "c", timing(2.0), run_id="s"),
        ],
    )
    ways = [[row[3] for row in table[1:]] for table in tables(text)]
    assert ways == [["+ c"], ["+ b"]], "LoRA before full fine-tuning"


def test_names_and_words_that_need_escapes(tmp_path):
    odd = dataclasses.replace(
        trial(FORWARD, 1, "", "a", Timing(why=WEIRD), command=WEIRD),
        optimizations=(WEIRD,),
        candidates=(WEIRD,),
        run_id=WEIRD,
    )
    text = rendered(tmp_path, [odd, dataclasses.replace(odd, timing=timing(2.0), round=2)])
    tokens = [child for token in MarkdownIt("commonmark").parse(text) for child in (token, *(token.children or ()))]
    comments = [token.content for token in tokens if token.type.startswith("html")]
    assert (
        all(content.startswith("<!--") for content in comments) and "http://e" not in text.replace("`", "").split("](")[1:]
    )
    (path,) = tables(text)
    assert len(path) == 3 and all(len(row) == 7 for row in path)


def test_one_command_renders_and_checks_it_with_the_rest(tmp_path):
    rendered(tmp_path, whole(timing(0.625), timing(0.5)))
    assert differences(tmp_path / "data", tmp_path) == []
    (tmp_path / FOLDER / "README.md").write_text("edited")
    assert differences(tmp_path / "data", tmp_path) == ["search/README.md (differs)"]
    trials.path_of(tmp_path, SLUG).unlink()
    render(tmp_path / "data", tmp_path)
    assert not (tmp_path / FOLDER).exists() or not list((tmp_path / FOLDER).glob("*.png"))


def test_a_waterfall_of_other_numbers_is_another_one():
    first = plots.waterfall([("+ a", 2.0), ("− a + c", 1.25)], "X1")
    assert first == plots.waterfall([("+ a", 2.0), ("− a + c", 1.25)], "X1")
    assert not plots.same_image(first, plots.waterfall([("+ a", 2.0), ("− a + c", 0.8)], "X1"))


# Records


def test_a_trial_comes_back_as_it_was():
    for one in whole(timing(0.625, peak_memory_bytes=5, against_peak_memory_bytes=4, launches=3), Timing(why="no")):
        assert trials.from_json(jsonl.dumps(one)) == one


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"stage": "sideways"}, "stage is 'sideways', not one of forward, exchange, leave-one-out"),
        ({"optimizations": []}, "a set is compared with itself"),
        ({"stage": "leave-one-out"}, "one is to be left out, and nothing added"),
        ({"finished_at": "yesterday"}, "Invalid isoformat"),
        ({"schema": 2}, "record schema 2 is not 1"),
        ({"round": "1"}, "round is '1', not a whole number"),
        ({"against": "a"}, "against is 'a', not an array"),
        ({"environment": {"device_slug": "other"}}, "it is of device 'other', which belongs in other.jsonl"),
        ({"extra": 1}, "unknown key 'extra' in it"),
        ({"timing": {}}, "no key 'ratio'"),
        ({"timing": {"why": "broke"}}, "a trial has its times or a reason for having none"),
        ({"timing": {"ratio": None}}, "a trial has its times or a reason for having none"),
        ({"timing": {"ratio": "nan"}}, "ratio is nan, not a positive number"),
        ({"timing": {"micro_step_ms": 0}}, "micro_step_ms is 0, not a positive number"),
        ({"timing": {"blocks": 1.5}}, "blocks is 1.5, not a whole number"),
    ],
)
def test_a_line_that_is_no_trial_is_named(tmp_path, changed, words):
    line = json.loads(jsonl.dumps(trial(FORWARD, 1, "", "a", timing(2.0))))
    fields = changed.get("timing")
    if fields:
        changed = changed | {"timing": line["timing"] | fields}
    path = trials.path_of(tmp_path, SLUG)
    jsonl.append(path, json.dumps(line | changed))
    with pytest.raises(UserError) as raised:
        render(tmp_path / "data", tmp_path)
    assert str(raised.value).startswith(f"{path}:1: not a valid record: ") and words in str(raised.value)


def test_a_time_and_a_reason_for_none_exclude_each_other():
    with pytest.raises(ValueError, match="a trial has its times or a reason for having none"):
        timing(2.0, why="slow")
