"""What ships beside the fastest peer: headline.json, the table in README.md, and when there is no such pair."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
from pathlib import Path

import pytest
import synthetic_records as synthetic
import torch
from rendered import tables

from abtest import environment
from abtest.verdict import Level, Verdict
from bench import records
from bench.records import Record
from bench.report import differences, headline, readme, render
from bench.report.__main__ import main
from bench.report.devices import select
from bench.report.shipping import decide

SLUG = "example-gpu-x1"
KEYS = [
    "device", "model", "method", "pack_length", "supervised_fraction", "shipped_real_tokens_per_s", "best_peer",
    "best_peer_real_tokens_per_s", "ratio", "ratio_low", "ratio_high", "matrix_floor_fraction", "gate",
]  # fmt: skip
RECIPE = {
    "model": "qwen3.5-2b", "method": "lora", "dtype": "bfloat16", "gradient_checkpointing": True, "lora": {"rank": 128},
    "data": {"pack_length": 5376},
}  # fmt: skip
RATES = {"copy_bytes_per_s": 4e12, "matmul_flops_per_s": 8e14, "matmul_dtype": "bfloat16"}
BIG = {"recipe": RECIPE, "environment": synthetic.ENVIRONMENT | RATES, "losses": ()}


def stock(**changes) -> Record:
    return synthetic.reference(**BIG | changes)


def shipped(ratio: float = 4.0, width: float = 0.2, **changes) -> Record:
    """Tokens and times are of other minutes than the ratio's."""
    perf = synthetic.perf(ratio, width, real_tokens_per_s=20_000.0, micro_step_ms=250.0)
    return synthetic.record("search", **BIG | {"role": "combination", "perf": perf} | changes)


def peer(arm: str = "unsloth", ratio: float = 2.5, tokens: float = 10_000.0, **changes) -> Record:
    level = changes.pop("level", Level.ROUNDING)
    perf = synthetic.perf(ratio, 0.1, real_tokens_per_s=tokens)
    return synthetic.record(arm, level, **BIG | {"role": "peer", "perf": perf} | changes)


def found(*run: Record) -> list[headline.Pair]:
    device = select(SLUG, run)
    return headline.pairs([(device, [decide(setting.run) for setting in device.settings])])


def write(reports: Path, *run: Record) -> Path:
    for record in run:
        records.append(reports / "data" / SLUG / "run.jsonl", record)
    return reports / "data"


def entries(reports: Path) -> list[dict]:
    return json.loads((reports / "headline.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


# The pair


def test_an_entry_holds_what_was_measured(tmp_path):
    render(write(tmp_path, stock(), shipped(), peer()), tmp_path)
    (entry,) = entries(tmp_path)
    assert list(entry) == KEYS
    supervised, matrices, adapters, head = 0.4567, 1.373e9, 125.0e6, 0.509e9  # weights, worked out by hand
    flops = 5376 * (4 * (matrices + supervised * head) + 6 * adapters)
    assert entry.pop("matrix_floor_fraction") == pytest.approx(flops / 8e14 / 0.250, rel=0.001)
    assert entry.pop("ratio") == pytest.approx(1.6)
    assert (entry.pop("ratio_low"), entry.pop("ratio_high")) == (pytest.approx(3.8 / 2.6), pytest.approx(4.2 / 2.4))
    assert entry == {
        "device": "Example GPU X1", "model": "qwen3.5-2b", "method": "lora", "pack_length": 5376,
        "supervised_fraction": 0.4567, "shipped_real_tokens_per_s": 20_000.0, "best_peer": "unsloth",
        "best_peer_real_tokens_per_s": 10_000.0, "gate": "ROUNDING",
    }  # fmt: skip


def test_the_interval_holds_whatever_the_two_errors_have_to_do_with_each_other():
    """Half-widths of the logarithms add up; in quadrature they would make an interval for independent errors alone."""
    (pair,) = found(stock(), shipped(4.0, 0.2), peer(ratio=2.5))
    half = math.log(pair.ratio_high / pair.ratio_low) / 2
    alone = [math.log(high / low) / 2 for low, high in ((3.8, 4.2), (2.4, 2.6))]
    assert half == pytest.approx(sum(alone)) and half > math.hypot(*alone)


def test_the_fastest_peer_counts_whatever_its_verdict():
    slower, leaks = peer("slower", 1.5, 13_000.0), peer("leaks", 3.0, 12_000.0, level=Level.FAILED)
    (pair,) = found(stock(), shipped(), slower, leaks, peer())
    assert pair.peer is leaks and pair.ratio == pytest.approx(4 / 3)
    table = headline.markdown([pair])
    assert "| `leaks` (FAILED) |" in table
    supervised = pair.entry()["supervised_fraction"]
    where = f"Example GPU X1, qwen3.5-2b, lora, packs of 5,376, {100 * supervised:.1f} % supervised"
    assert f"- `leaks` on {where}, is not lossless. FAILED: largest loss difference 2.1 sigma" in table
    assert "not lossless" not in headline.markdown(found(stock(), shipped(), peer()))


def test_of_a_long_reason_the_beginning_is_enough():
    """A library's error may list every process of a machine; the peer's own page has all of it."""
    verdict = Verdict(Level.FAILED, "no memory: " + "ab cd " * 200)
    leaks = dataclasses.replace(peer("leaks", level=Level.FAILED), verdict=verdict)
    table = headline.markdown(found(stock(), shipped(), leaks))
    (line,) = [line for line in table.splitlines() if line.startswith("- `leaks`")]
    assert "FAILED: no memory: ab cd" in line and line.endswith(" …") and len(line) < 300


RACE = records.Race("search", ("silu_mul", "static_lora"), 1.9, 1.8, 2.0, 20)


def test_a_race_is_the_ratio_where_it_was_with_what_ships():
    """A host that is busy for a while slows stock most, and with it the ratios of one of the two."""
    raced = peer(race=RACE)
    assert shipped().optimizations == RACE.optimizations
    (pair,) = found(stock(), shipped(), raced)
    assert (pair.ratio, pair.ratio_low, pair.ratio_high) == (1.9, 1.8, 2.0)
    others = (
        dataclasses.replace(RACE, arm="combination"), dataclasses.replace(RACE, optimizations=("rms_norm",)),
        dataclasses.replace(RACE, ratio_high=math.inf),
    )  # fmt: skip
    for other in others:
        (pair,) = found(stock(), shipped(), peer(race=other))
        assert pair.ratio == pytest.approx(1.6)
    (pair,) = found(stock(), shipped(), raced, peer("nearer", race=dataclasses.replace(RACE, ratio=1.2, ratio_low=1.1)))
    assert pair.peer.arm == "nearer"


@pytest.mark.parametrize(
    ("tokens", "ratio", "low", "high"), [(10_000.0, 1.6, 3.8 / 2.6, 4.2 / 2.4), (14_000.0, 20 / 14, 20 / 14, 1.75)]
)
def test_without_a_race_the_smaller_of_two_reckonings_counts(tokens, ratio, low, high):
    (pair,) = found(stock(), shipped(), peer(tokens=tokens))
    assert (pair.ratio, pair.ratio_low, pair.ratio_high) == (pytest.approx(ratio), pytest.approx(low), pytest.approx(high))


OTHER_STOCK = RECIPE | {"data": {"pack_length": 5376, "rows": "padded"}}
NO_TIME = {"perf": None, "untimed": "timing broke off"}


@pytest.mark.parametrize(
    "run",
    [
        (),
        (peer(),),
        (shipped(),),
        (shipped(), peer(**NO_TIME)),
        (shipped(), peer(level=Level.NOT_RUN, perf=None)),
        (shipped(0.9), peer()),
        (shipped(level=Level.FAILED, perf=None), peer()),
        (shipped(), peer(recipe=OTHER_STOCK)),
        (shipped(), peer(perf=synthetic.perf(math.nan))),
        (shipped(), peer(perf=synthetic.perf(0.05, 0.05))),
        (shipped(), peer("other", role="optimization")),
        (shipped(perf=synthetic.perf(2.0, ratio_high=math.inf)), peer()),
    ],
)
def test_without_both_there_is_no_pair(run):
    assert found(stock(), *run) == []


def test_peer_and_what_ships_are_of_the_newest_run_of_their_setting():
    later = {"run_id": "later", "finished_at": "2026-02-01T00:00:00Z"}
    run = [stock(), shipped(), peer()]
    assert found(*run, stock(**later), shipped(**later)) == []
    (pair,) = found(*run, stock(**later), shipped(3.0, **later), peer(**later))
    assert pair.ratio == pytest.approx(3.0 / 2.5)
    full = {"recipe": RECIPE | {"method": "full"}, "run_id": "full", "finished_at": "2026-03-01T00:00:00Z"}
    both = found(*run, stock(**full), shipped(**full), peer(**full))
    assert [pair.trained.method for pair in both] == ["lora", "full"]
    assert [pair.page for pair in both] == [
        f"{SLUG}/qwen3.5-2b-{method}-5376-bfloat16/README.md" for method in ("lora", "full")
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": RECIPE | {"model": "/models/mine"}}, {"environment": synthetic.ENVIRONMENT},
        {"data": {"documents": 3, "packs": 1}},
    ],
)  # fmt: skip
def test_what_a_record_does_not_say_is_null(changes, tmp_path):
    render(write(tmp_path, *(make(**changes) for make in (stock, shipped, peer))), tmp_path)
    (entry,) = entries(tmp_path)
    assert entry["matrix_floor_fraction"] is None
    assert (entry["supervised_fraction"] is None) == ("data" in changes)
    (row,) = tables(headline.markdown(found(*(make(**changes) for make in (stock, shipped, peer)))))[0][1:]
    assert row[9] == "–" and (row[4] == "–") == ("data" in changes)


# README.md


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A repository of its own, with an old table in README.md."""
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text(f"# Mine\n\n{readme.BEGIN}\nold\n{readme.END}\n\nthe rest\n", encoding="utf-8")
    write(tmp_path / "reports", stock(), shipped(), peer())
    return tmp_path


def test_one_command_keeps_the_table_of_the_repository_s_readme(repository, capsys):
    options = ["--reports", str(repository / "reports")]
    assert main(options) == 0 and main([*options, "--check"]) == 0
    path = repository / "README.md"
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"# Mine\n\n{readme.BEGIN}\n\n| device |") and text.endswith(f"{readme.END}\n\nthe rest\n")
    assert "old" not in text
    (row,) = tables(text)[0][1:]
    assert row == [
        "Example GPU X1", "qwen3.5-2b", "lora", "5,376", "45.7 %", "20,000", "unsloth", "10,000", "1.60x [1.46, 1.75]",
        "19.3 %", "ROUNDING",
    ]  # fmt: skip
    assert f"](reports/{SLUG}/README.md)" in text and (repository / f"reports/{SLUG}/README.md").is_file()
    before = path.stat().st_mtime_ns
    assert main(options) == 0 and path.stat().st_mtime_ns == before
    path.write_text(text.replace("20,000", "90,000"), encoding="utf-8")
    (repository / "reports/headline.json").write_text("[]", encoding="utf-8")
    capsys.readouterr()
    assert main([*options, "--check"]) == 1
    assert "../README.md (differs), headline.json (differs)" in capsys.readouterr().err
    assert "90,000" in path.read_text(encoding="utf-8")


def test_reports_elsewhere_leave_the_readme_alone(repository, tmp_path):
    before = (repository / "README.md").read_bytes()
    elsewhere = tmp_path / "elsewhere" / "reports"
    render(write(elsewhere, stock(), shipped(), peer()), elsewhere)
    assert len(entries(elsewhere)) == 1 and (repository / "README.md").read_bytes() == before
    assert not (elsewhere.parent / "README.md").exists()
    assert differences(elsewhere / "data", elsewhere) == []


@pytest.mark.parametrize("text", ["no comments\n", readme.BEGIN, f"{readme.END}\n{readme.BEGIN}\n"])
def test_a_readme_without_the_comments_is_somebody_else_s(repository, text):
    path = repository / "README.md"
    assert readme.files(repository / "reports", "table").keys() == {Path("../README.md")}
    path.write_text(text, encoding="utf-8")
    assert readme.files(repository / "reports", "table") == {}
    path.unlink()
    assert readme.files(repository / "reports", "table") == {}


def test_without_a_pair_one_sentence_names_the_command(tmp_path):
    render(write(tmp_path, stock(), shipped()), tmp_path)
    assert (tmp_path / "headline.json").read_text(encoding="utf-8") == "[]\n"
    assert headline.markdown([]) == headline.NO_PAIR
    assert '`make bench EXTRAS="dev gpu peers" ARGS="--peers"`' in headline.NO_PAIR and "\n" not in headline.NO_PAIR


def test_names_that_need_escapes_keep_the_table_whole():
    odd = 'a|b\n<script> `c` "d" ](http://e)'
    changes = {"environment": BIG["environment"] | {"device": odd}, "recipe": RECIPE | {"model": odd}}
    text = headline.markdown(found(stock(**changes), shipped(**changes), peer(odd, **changes)))
    (row,) = tables(text)[0][1:]
    assert len(row) == len(headline.HEADER) and "<script>" not in text.replace("`", "").split("| **20,000** |")[0]


def test_a_rendered_readme_is_no_uncommitted_change(tmp_path, monkeypatch):
    """Else a run could not go on after its own rendering."""
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for name in ("README.md", "code.py", "reports/README.md", "kernels/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one")
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    assert environment.describe(torch.device("cpu"))["git_dirty"] is False
    (tmp_path / "README.md").write_text("two")
    (tmp_path / "reports/README.md").write_text("two")
    assert environment.describe(torch.device("cpu"))["git_dirty"] is False
    (tmp_path / "code.py").write_text("two")
    assert environment.describe(torch.device("cpu"))["git_dirty"] is True
