"""Several things trained on one device, and one run of several commands: what is compared with what, and what ships."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import synthetic_records as synthetic
from markdown_it import MarkdownIt
from rendered import tables

from abtest.verdict import Level
from bench import records
from bench.records import Record
from bench.report import differences, render, summary_json
from bench.report.devices import select
from bench.report.overview import train_command
from bench.report.settings import Trained, folder_names, trained_by
from bench.report.shipping import decide, timing_floor
from bench.report.text import launches_saved
from loop.cli import parse
from loop.config import Config
from loop.shipping import read_shipping
from loop.train import Command

SLUG = "example-gpu-x1"
BIG = {"model": "qwen3.5-2b", "data": {"pack_length": 5376}, "device": "cuda"}
BIG_FULL = BIG | {"method": "full"}
LORA_FOLDER, FULL_FOLDER = "qwen3.5-2b-lora-5376-bfloat16", "qwen3.5-2b-full-5376-bfloat16"


def at(minute: int, record: Record, **changes) -> Record:
    """`record`, finished at that minute; recipe: what differs from the usual one."""
    recipe = record.recipe | changes.pop("recipe", {})
    return dataclasses.replace(record, finished_at=f"2026-01-02T03:{minute:02}:00Z", recipe=recipe, **changes)


def stock(minute: int, **changes) -> Record:
    return at(minute, synthetic.reference(), **changes)


def again(minute: int, ratio: float, **changes) -> Record:
    repeat = synthetic.record("stock_again", Level.BITWISE, role="repeat", perf=synthetic.perf(ratio))
    return at(minute, repeat, **changes)


def arm(minute: int, name: str, ratio: float | None = 1.2, level: Level = Level.ROUNDING, **changes) -> Record:
    perf = synthetic.perf(ratio, launches=1000) if ratio else None
    return at(minute, synthetic.record(name, level, perf=perf), **changes)


def write(reports: Path, found: list[Record]) -> Path:
    for record in found:
        records.append(reports / "data" / SLUG / "records.jsonl", record)
    return reports / "data"


def three_settings() -> list[Record]:
    """A big LoRA run, a later big full fine-tuning, and a still later tiny one, as three runs."""
    lora = {"run_id": "lora", "recipe": BIG}
    full = {"run_id": "full", "recipe": BIG_FULL, "command": "python -m bench.run --method full"}
    tiny = {"run_id": "tiny", "command": "python -m bench.run --model qwen3.5-tiny"}
    return [
        stock(1, **lora), arm(2, "static_lora", 1.5, **lora), arm(3, "silu_mul", 1.3, **lora),
        stock(4, **full), arm(5, "full_ft_linear", 1.4, **full), arm(6, "silu_mul", 1.1, **full),
        stock(7, **tiny), arm(8, "silu_mul", 0.7, **tiny),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    reports = tmp_path_factory.mktemp("settings") / "reports"
    render(write(reports, three_settings()), reports)
    return reports


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


# Several settings


def test_the_first_page_has_a_row_for_each_setting(three):
    rows = tables(text(three / "README.md"))[0][1:]
    assert [(row[0], row[2], row[3]) for row in rows] == [
        ("Example GPU X1", "static_lora", "1.50x [1.48, 1.52]"),
        ("", "full_ft_linear", "1.40x [1.38, 1.42]"),
        ("", "nothing: see the report", "–"),
    ]
    assert [row[1] for row in rows] == [
        "qwen3.5-2b · LoRA r=16 · bfloat16 · pack length 5376 · 30 steps",
        "qwen3.5-2b · full fine-tuning · bfloat16 · pack length 5376 · 30 steps",
        "qwen3.5-tiny · LoRA r=16 · bfloat16 · pack length 512 · 30 steps",
    ]
    assert f"]({SLUG}/{LORA_FOLDER}/README.md)" in text(three / "README.md")


def test_a_device_with_several_settings_has_a_folder_for_each(three):
    folders = {path.name for path in (three / SLUG).iterdir()}
    assert folders == {"README.md", "shipping.toml", LORA_FOLDER, FULL_FOLDER, "qwen3.5-tiny-lora-512-bfloat16"}
    index = text(three / SLUG / "README.md")
    assert "**Switch on `static_lora`: 1.50x" in index and "**Switch on `full_ft_linear`: 1.40x" in index
    assert "`python -m loop.train --model qwen3.5-2b --method full --data.pack-length 5376 --data my.jsonl`" in index
    page = text(three / SLUG / FULL_FOLDER / "README.md")
    assert page.splitlines()[1].startswith("# Example GPU X1: qwen3.5-2b · full fine-tuning")
    assert "`full_ft_linear`" in page and "static_lora" not in page and "## Earlier runs" not in page
    assert (three / SLUG / FULL_FOLDER / "silu_mul.md").is_file() and (three / SLUG / LORA_FOLDER / "silu_mul.png").is_file()


def test_every_link_leads_to_a_file(three):
    for path in three.rglob("*.md"):
        for token in MarkdownIt("commonmark").enable("table").parse(text(path)):
            for child in token.children or ():
                target = child.attrGet("href") or child.attrGet("src")
                assert target is None or (path.parent / str(target)).is_file(), (path, target)


def test_shipping_toml_has_each_setting_and_the_loop_reads_its_own(three):
    values = tomllib.loads(text(three / SLUG / "shipping.toml"))
    assert [(table["model"], table["method"], table["run_id"], table["enable"]) for table in values["setting"]] == [
        ("qwen3.5-2b", "lora", "lora", ["static_lora"]),
        ("qwen3.5-2b", "full", "full", ["full_ft_linear"]),
        ("qwen3.5-tiny", "lora", "tiny", []),
    ]
    assert [set(table["not_enabled"]) for table in values["setting"]] == [{"silu_mul"}] * 3
    for model, method, enable in (
        ("qwen3.5-2b", "lora", ("static_lora",)), ("qwen3.5-2b", "full", ("full_ft_linear",)), ("qwen3.5-tiny", "lora", ()),
    ):  # fmt: skip
        assert read_shipping(Config(model=model, method=method), SLUG, "bfloat16", three).enable == enable


def test_the_command_on_a_page_trains_in_its_setting(tmp_path):
    tiny = {"run_id": "long", "recipe": {"device": "cpu", "data": {"pack_length": 4096}}}
    found = [
        *three_settings(),
        arm(7, "tiny_alone", 1.2, run_id="tiny"),
        stock(9, **tiny),
        arm(10, "long_alone", 1.2, **tiny),
    ]
    render(write(tmp_path, found), tmp_path)
    device = select(SLUG, found)
    assert len(device.settings) == 4
    for setting in device.settings:
        words = shlex.split(train_command(setting))
        command = parse(Command(), "", "", words[3:])
        dtype = "bfloat16" if command.dtype == "auto" else command.dtype
        assert read_shipping(command, SLUG, dtype, tmp_path).enable == decide(setting.run).enable != ()


def test_a_later_tiny_run_does_not_replace_the_big_one(tmp_path):
    """Nor does it leave pages behind where they no longer belong: the only setting's pages are the device's own."""
    found = three_settings()
    render(write(tmp_path, found[:3]), tmp_path)
    assert (tmp_path / SLUG / "static_lora.md").is_file() and not (tmp_path / SLUG / LORA_FOLDER).exists()
    before = tomllib.loads(text(tmp_path / SLUG / "shipping.toml"))["setting"]
    render(write(tmp_path, found[6:]), tmp_path)
    after = tomllib.loads(text(tmp_path / SLUG / "shipping.toml"))["setting"]
    assert after[0] == before[0] and len(after) == 2
    assert not (tmp_path / SLUG / "static_lora.md").exists() and (tmp_path / SLUG / LORA_FOLDER / "static_lora.md").is_file()
    assert differences(tmp_path / "data", tmp_path) == []


def test_runs_of_one_setting_are_current_earlier_and_older(tmp_path):
    found = three_settings()
    newer = {"run_id": "lora2", "recipe": BIG}
    device = select(SLUG, [*found, stock(20, **newer), arm(21, "silu_mul", 1.6, **newer)])
    lora, full, _ = device.settings
    assert lora.run_id == "lora2" and {record.arm for record in lora.current} == {"stock", "silu_mul"}
    assert [record.arm for record in lora.earlier] == ["static_lora"] and lora.older == {"stock": 1, "silu_mul": 1}
    assert full.run_id == "full" and full.earlier == () and full.older == {}


def test_an_arm_with_a_recipe_of_its_own_stays_beside_its_run(tmp_path):
    lora = {"run_id": "lora", "recipe": BIG}
    own = arm(3, "packing", 2.0, run_id="lora", recipe=BIG | {"data": {"pack_length": 1024}})
    (setting,) = select(SLUG, [stock(1, **lora), arm(2, "silu_mul", 1.3, **lora), own]).settings
    assert setting.trained == Trained("qwen3.5-2b", "lora", 5376, "bfloat16", rank=16) and len(setting.current) == 3
    shipping = decide(setting.run)
    assert shipping.enable == ("silu_mul",) and "stock of another recipe" in shipping.reasons["packing"]
    assert launches_saved(own, setting.stock_of(own)) is None
    assert select(SLUG, [own]).settings[0].trained.pack_length == 1024  # without a reference its own says it


def test_one_run_id_over_two_methods_is_two_settings():
    lora = {"run_id": "one", "recipe": BIG, "command": "lora"}
    full = {"run_id": "one", "recipe": BIG_FULL, "command": "full"}
    found = [stock(1, **lora), stock(1, **full), arm(2, "a", **lora), arm(2, "b", **full), arm(3, "c", **lora)]
    assert [[record.arm for record in setting.run] for setting in select(SLUG, found).settings] == [
        ["stock", "a", "c"], ["stock", "b"]
    ]  # fmt: skip


# Several commands in one run


def commands() -> list[Record]:
    """Two commands of one run, side by side: their records interleave, and their recipes differ in the arms asked for."""
    one, two = ({"command": f"python -m bench.run --arms {n}", "recipe": {"arms": [n]}} for n in ("a", "b"))
    return [
        stock(1, **one), again(1, 1.06, **one), stock(2, **two), again(2, 1.01, **two), arm(3, "b", 1.3, **two),
        arm(4, "a", 1.07, **one), arm(5, "c", 1.2, **one),
    ]  # fmt: skip


def test_commands_of_one_run_are_one_page(tmp_path):
    render(write(tmp_path, commands()), tmp_path)
    page = text(tmp_path / SLUG / "README.md")
    assert page.count("python -m bench.run --arms a\n") == page.count("python -m bench.run --arms b\n") == 1
    assert "3 arms beside the reference: 3 ROUNDING; 3 timed. 2 commands, numbered from the top:" in page
    decisions, others = (
        next(t for t in tables(page) if t[0][0:2] == head) for head in (["optimization", "claim"], ["arm", "role"])
    )
    assert [(row[0], row[8]) for row in decisions[1:]] == [(name, "234 of 1,234") for name in ("b", "c", "a")]
    assert [(row[0], row[3], row[6][:9]) for row in others[1:]] == [
        ("stock", "–", "command 1"), ("stock_again", "1.06x [1.04, 1.08]", "command 1"),
        ("stock", "–", "command 2"), ("stock_again", "1.01x [0.99, 1.03]", "command 2"),
    ]  # fmt: skip
    assert "## Earlier runs" not in page
    assert "1,000, 234 fewer than the reference's 1,234" in text(tmp_path / SLUG / "b.md")


def test_the_floor_is_the_worst_of_all_commands():
    found = commands()
    assert timing_floor(found) == pytest.approx(1.08)
    shipping = decide(found)
    assert shipping.enable == ("b",)
    assert shipping.not_enabled["a"].endswith("[1.05, 1.09]; the reference against itself reaches 1.080")
    without = [record for record in found if not (record.role == "repeat" and record.perf.ratio == 1.06)]
    assert "faster and they were not measured together" in decide(without).not_enabled["a"]


@pytest.mark.parametrize("bad", [0, 1, 2, 3], ids=["stock of a", "stock_again of a", "stock of b", "stock_again of b"])
def test_a_bad_reference_of_any_command_blocks(bad):
    found = commands()
    found[bad] = dataclasses.replace(found[bad], perf=None, verdict=synthetic.verdict(Level.INVALID, "0.1 at step 3"))
    shipping = decide(found)
    assert shipping.enable == () and set(shipping.not_enabled) == {"a", "b", "c"}
    assert set(shipping.reasons.values()) == {"the reference itself is INVALID: 0.1 at step 3"}


def test_stock_of_a_command_that_went_on_in_another_process_is_held_against_it():
    """Two processes of the same words, one after the other or side by side: nothing says whose an arm was."""
    one = {"command": "python -m bench.run --run one"}
    good, bad = (
        stock(1, **one),
        dataclasses.replace(stock(2, **one), perf=None, verdict=synthetic.verdict(Level.INVALID, "0.1")),
    )
    arms = [arm(3, "a", 1.2, **one), arm(4, "c", 1.3, **one)]
    assert decide([good, *arms]).enable == ("c",)
    for stocks in ([good, bad], [bad, good]):
        assert decide([*stocks, *arms]).enable == () and decide([stocks[0], arms[0], stocks[1], arms[1]]).enable == ()


def test_a_command_without_a_reference_needs_all_of_the_run_to_be_good():
    lone = arm(9, "lone", 1.2, command="python -m bench.run --arms lone")
    assert decide([*commands(), lone]).enable == ("b",)
    bad = dataclasses.replace(stock(8, command="third"), perf=None, verdict=synthetic.verdict(Level.FAILED, "no"))
    assert decide([*commands(), bad]).enable == ("b",)  # no arm stood beside it
    assert decide([*commands(), bad, lone]).enable == ()


def test_an_arm_measured_twice_in_a_run_counts_once_with_its_newest():
    shipping = decide([*commands(), arm(9, "b", 1.1, command="python -m bench.run --arms b", recipe={"arms": ["b"]})])
    assert shipping.enable == ("c",) and "1.10x" in shipping.not_enabled["b"]


def test_the_summary_is_of_the_newest_setting():
    document = json.loads(summary_json(three_settings()))
    assert document["run_id"] == "tiny" and document["model"] == "qwen3.5-tiny" and document["shipping"] == []
    assert [found["arm"] for found in document["arms"]] == ["stock", "silu_mul"]


# Folder names


def test_folder_names_say_what_was_trained_and_not_where_it_lies():
    lora = [
        Trained(model, "lora", 512, "bfloat16") for model in ("/home/me/secret/My Model_2B/", "Qwen/Qwen3.5-2B", "..", "")
    ]
    assert folder_names(lora[:3]) == [
        "my-model-2b-lora-512-bfloat16",
        "qwen3.5-2b-lora-512-bfloat16",
        "unnamed-lora-512-bfloat16",
    ]
    assert folder_names([Trained("", "", None, "")]) == ["unnamed"]
    for name in folder_names([Trained("模型" * 90 + "/../x\\..\\y|z\n", "lora", 512, "f")]):
        assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name)


def test_what_is_supervised_is_part_of_a_setting(tmp_path):
    """Another loss, other speeds: the newest of either counts, and neither stands for the other."""
    every = synthetic.RECIPE | {"data": synthetic.RECIPE.get("data", {}) | {"supervise": "all"}}
    later = {"recipe": every, "run_id": "every", "finished_at": "2026-05-01T00:00:00Z"}
    slug = synthetic.ENVIRONMENT["device_slug"]
    run = [synthetic.reference(), synthetic.record(perf=synthetic.perf(1.5))]
    run += [synthetic.reference(**later), synthetic.record("static_lora", perf=synthetic.perf(1.2), **later)]
    for record in run:
        records.append(tmp_path / "data" / slug / "run.jsonl", record)
    render(tmp_path / "data", tmp_path)
    usual, other = sorted(path for path in (tmp_path / slug).iterdir() if path.is_dir())
    assert other.name == f"{usual.name}-supervise-all"
    assert "every token supervised" in (other / "README.md").read_text(encoding="utf-8").partition("\n\n")[0]
    assert "--data.supervise all" in (other / "README.md").read_text(encoding="utf-8")
    assert "every token supervised" not in (usual / "README.md").read_text(encoding="utf-8").partition("\n\n")[0]
    found = tomllib.loads((tmp_path / slug / "shipping.toml").read_text(encoding="utf-8"))["setting"]
    assert [(one.get("supervise"), one["enable"]) for one in found] == [(None, ["silu_mul"]), ("all", ["static_lora"])]


def test_the_adapters_rank_is_part_of_a_setting(tmp_path):
    """Other products, another noise floor. A folder says it where there are several, the command where it is unusual."""
    high = synthetic.RECIPE | {"method": "lora", "lora": {"rank": 128, "alpha": 256.0}}
    low = high | {"lora": {"rank": 16, "alpha": 32.0}}
    slug = synthetic.ENVIRONMENT["device_slug"]
    for day, (run_id, recipe) in enumerate((("high", high), ("low", low)), 1):
        later = {"recipe": recipe, "run_id": run_id, "finished_at": f"2026-05-0{day}T00:00:00Z"}
        for record in (synthetic.reference(**later), synthetic.record("static_lora", perf=synthetic.perf(1.2), **later)):
            records.append(tmp_path / "data" / slug / "run.jsonl", record)
    render(tmp_path / "data", tmp_path)
    folders = sorted(path for path in (tmp_path / slug).iterdir() if path.is_dir())
    assert [path.name.rpartition("-")[2] for path in folders] == ["r128", "r16"]
    assert folder_names([trained_by(high, "bfloat16")]) == [folders[0].name.removesuffix("-r128")]
    commands = [(path / "README.md").read_text(encoding="utf-8") for path in folders]
    assert "--lora.rank 128 --lora.alpha 256" in commands[0] and "--lora" not in commands[1]
    shipped = tomllib.loads((tmp_path / slug / "shipping.toml").read_text(encoding="utf-8"))["setting"]
    assert [(one["rank"], one["run_id"]) for one in shipped] == [(128, "high"), (16, "low")]


def test_full_fine_tuning_has_no_rank():
    recipe = {"model": "m", "method": "full", "lora": {"rank": 16}, "data": {"pack_length": 512}}
    assert trained_by(recipe, "bfloat16") == Trained("m", "full", 512, "bfloat16")
    assert trained_by(recipe | {"method": "lora"}, "bfloat16").rank == 16
    assert trained_by(recipe | {"method": "lora", "lora": {"rank": "16"}}, "bfloat16").rank is None


def test_models_that_would_share_a_folder_do_not():
    names = folder_names([Trained(model, "lora", 512, "bfloat16") for model in ("a/m", "b/m", "c/other")])
    assert len(set(names)) == 3 and names[2] == "other-lora-512-bfloat16"
    assert all(re.fullmatch(r"m-lora-512-bfloat16-[0-9a-f]{8}", name) for name in names[:2])
