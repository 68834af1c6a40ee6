"""Rendering: a pure function of the records, that survives whatever a record may hold."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import synthetic_records as synthetic
from markdown_it import MarkdownIt
from PIL import Image
from rendered import tables

from abtest.verdict import Check, Level, Verdict
from bench import records
from bench.report import differences, plots, render
from bench.report.text import page_name
from loop.errors import UserError

SLUG = "example-gpu-x1"
ROOT = Path(__file__).resolve().parents[2]
WEIRD = 'a|b\n<script> `c` "d" $x_1$ \\ ](http://e) 漢字 **f** __g__'


def write(reports: Path, found: list[records.Record], slug: str = SLUG, name: str = "run.jsonl") -> Path:
    for record in found:
        records.append(reports / "data" / slug / name, record)
    return reports / "data"


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    """A report of every kind of arm, rendered once; tests must not change it."""
    reports = tmp_path_factory.mktemp("full") / "reports"
    earlier = {"run_id": "20250101-000000", "finished_at": "2025-01-01T00:00:00+00:00"}
    found = [
        synthetic.record("retired", perf=synthetic.perf(1.5), **earlier),
        synthetic.record("silu_mul", perf=synthetic.perf(9.99), **earlier),
        *synthetic.full_run(),
    ]
    render(write(reports, found), reports)
    return reports


def test_rendering_elsewhere_gives_the_same_bytes(full, tmp_path):
    """Another process, folder, hash seed, time zone, locale, backend and matplotlibrc; into an empty folder."""
    (tmp_path / "matplotlibrc").write_text("font.size: 31\nsavefig.dpi: 20\naxes.grid: True\n", encoding="utf-8")
    fresh = tmp_path / "elsewhere"
    data = fresh / "data" / SLUG
    data.mkdir(parents=True)
    (data / "run.jsonl").write_bytes((full / "data" / SLUG / "run.jsonl").read_bytes())
    environment = os.environ | {
        "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C", "MPLBACKEND": "svg", "PYTHONPATH": str(ROOT),
        "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"), "SOURCE_DATE_EPOCH": "1",
    }  # fmt: skip
    command = [sys.executable, "-W", "error", "-m", "bench.report", "--reports", "elsewhere"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=120)
    made = {path.relative_to(fresh): path.read_bytes() for path in fresh.rglob("*") if path.is_file()}
    assert made == {path.relative_to(full): path.read_bytes() for path in full.rglob("*") if path.is_file()}
    assert sum(path.suffix == ".png" for path in made) == 14


def test_rendering_again_touches_nothing(full):
    before = {path: path.stat().st_mtime_ns for path in full.rglob("*") if path.is_file()}
    render(full / "data", full)
    assert before == {path: path.stat().st_mtime_ns for path in full.rglob("*") if path.is_file()}


def test_no_file_names_the_machine_that_rendered(full):
    for path in full.rglob("*"):
        if path.is_file() and path.parent.parent.name != "data":
            data = path.read_bytes()
            assert str(full).encode() not in data and b"Software" not in data and b"atplotlib" not in data


def test_the_readme_decides(full):
    readme = (full / SLUG / "README.md").read_text(encoding="utf-8")
    assert "**Switch on `silu_mul` + `static_lora`: 1.23x [1.21, 1.25] the reference's speed, lossless (ROUNDING)" in readme
    assert "1,699 → 2,090 real tok/s, peak memory 22.5 GiB → 20.0 GiB" in readme
    decisions = next(table for table in tables(readme) if table[0][0] == "optimization")
    rows = {row[0]: row for row in decisions[1:]}
    assert [row[0] for row in decisions[1:4]] == ["all (silu_mul + static_lora)", "static_lora", "silu_mul"]
    assert rows["silu_mul"][4:9] == ["–", "1.06x [1.04, 1.08]", "1,801", "22.5 GiB", "0 of 1,234"]
    assert rows["fused_norm"][9] == "no: lossless but no measurable gain: ratio 1.003x [0.991, 1.015]"
    assert rows["wrong_backward"][3] == "loss, largest difference in sigma: 31.7, limit 6"
    assert rows["gated_only"][5:] == ["not timed", "–", "–", "–", "no: not timed here: Triton's interpreter is not timed"]
    assert rows["needs_fla"][9] == "no: NOT_RUN: fla is not installed"
    assert not {"stock", "peft_fla", "retired"} & set(rows)
    others = next(table for table in tables(readme) if table[0][1] == "role")
    assert [row[:3] for row in others[1:]] == [["stock", "reference", "BITWISE"], ["peft_fla", "peer", "ROUNDING"]]
    speeds = next(table for table in tables(readme) if table[0][1] == "real tokens/s")
    assert ["stock", "1,699", "1,800", "778", "284.4 ms", "22.5 GiB", "31.4 %", "1,234"] in speeds
    assert "12 arms beside the reference: 1 BITWISE, 6 ROUNDING, 1 APPROX, 2 FAILED, 1 INVALID, 1 NOT_RUN; 6 timed" in readme


def test_runs_are_not_mixed(full):
    readme = (full / SLUG / "README.md").read_text(encoding="utf-8")
    earlier = readme.split("## Earlier runs")[1]
    assert "1.50x" in earlier and "`20250101-000000`" in earlier and "`silu_mul` 1" in earlier
    assert "1.50x" not in readme.split("## Earlier runs")[0] and "9.99" not in readme
    page = (full / SLUG / "retired.md").read_text(encoding="utf-8")
    assert "not in the newest run, `20260102-030405-ab12`: its numbers are from `20250101-000000`" in page
    assert "1 older record of this arm not shown" in (full / SLUG / "silu_mul.md").read_text(encoding="utf-8")


def test_a_page_shows_every_check_beside_its_limit(full):
    page = (full / SLUG / "wrong_backward.md").read_text(encoding="utf-8")
    checks = next(table for table in tables(page) if table[0][0] == "check")
    assert checks[1] == ["loss, largest difference in sigma", "31.7", "6", "FAIL", "step 17"]
    assert checks[2][3:] == ["pass", "model.layers.0.mlp.down_proj.weight"]
    assert "delta_rule: pure PyTorch" in page and "delta_rule" not in (full / SLUG / "README.md").read_text(encoding="utf-8")
    assert "not timed" in page and "](wrong_backward.png)" in page
    assert ".png" not in (full / SLUG / "needs_fla.md").read_text(encoding="utf-8")


def test_every_link_and_image_leads_to_a_file(full):
    for path in full.rglob("*.md"):
        for token in MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8")):
            for child in token.children or ():
                target = child.attrGet("href") or child.attrGet("src")
                assert target is None or (path.parent / str(target)).is_file(), (path, target)


def test_every_plot_is_a_readable_image(full):
    for path in (full / SLUG).glob("*.png"):
        image = Image.open(io.BytesIO(path.read_bytes()))
        assert image.width == 1040 and image.height >= 200
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20  # something is drawn


def test_names_and_words_that_need_escapes(tmp_path):
    checks = (Check(WEIRD, math.nan, None, False, WEIRD), Check("second", math.inf, 1e-9, False))
    verdict = Verdict(Level.FAILED, WEIRD, checks)
    bad = synthetic.record(
        WEIRD, Level.FAILED, verdict=verdict, summary=WEIRD, why_exact=WEIRD, notes=(WEIRD,), command=WEIRD
    )
    odd = dataclasses.replace(bad, environment={"device": WEIRD, WEIRD: [WEIRD, None, {}]}, data={WEIRD: {WEIRD: WEIRD}})
    good = dataclasses.replace(odd, arm="README", verdict=synthetic.verdict(Level.ROUNDING), perf=synthetic.perf())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that the font lacks is a warning
        render(write(tmp_path, [odd, good], "a slug"), tmp_path)
    plain = " ".join(WEIRD.split())
    for path in (tmp_path / "a slug").glob("*.md"):
        for table in tables(path.read_text(encoding="utf-8")):
            assert {len(row) for row in table} == {len(table[0])}
    page = (tmp_path / "a slug" / f"{page_name(WEIRD)}.md").read_text(encoding="utf-8")
    rows = next(table for table in tables(page) if table[0][0] == "check")
    assert rows[1] == [plain, "nan", "–", "FAIL", plain] and rows[2][1:3] == ["inf", "1e-09"]
    assert page_name("README") != "README"
    assert tomllib.loads((tmp_path / "a slug" / "shipping.toml").read_text(encoding="utf-8"))["device"] == WEIRD


LOSSES = synthetic.REFERENCE_LOSSES


@pytest.mark.parametrize(
    "changes",
    [
        {"losses": (math.nan,) * 30},
        {"losses": (math.inf, -math.inf, 1e308, -1e308)},
        {"losses": LOSSES[:1], "reference_losses": LOSSES[:1]},
        {"losses": tuple(loss * 10.0**step for step, loss in enumerate(LOSSES))},
        {"reference_losses": ()},
        {"reference_losses": (math.nan,) * 30},
        {"noise_sigma": ()},
        {"noise_sigma": (0.0,) * 30},
        {"noise_sigma": (0.0, *synthetic.SIGMA[1:])},
        {"noise_sigma": (math.nan, *synthetic.SIGMA[1:])},
        {"noise_sigma": (5e-324,) * 30},
        {"losses": LOSSES * 40, "reference_losses": LOSSES * 40},
    ],
)
def test_no_loss_curve_breaks_the_plot(changes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = plots.loss_plot(synthetic.record(**changes), "device")
    assert Image.open(io.BytesIO(data)).size == (1040, 728)


def test_a_plot_of_other_numbers_is_another_plot():
    one = plots.loss_plot(synthetic.record(), "device")
    nearly = synthetic.record(losses=(*synthetic.record().losses[:-1], synthetic.record().losses[-1] + 1e-12))
    assert plots.same_image(one, plots.loss_plot(synthetic.record(), "device"))
    assert not plots.same_image(one, plots.loss_plot(nearly, "device"))


def test_what_a_plot_does_not_show_draws_no_other_one():
    """A record may come to hold more, or be of another command: a picture of the same numbers stays as it is."""
    arm = synthetic.record("a", Level.ROUNDING, perf=synthetic.perf(1.5))
    more = dataclasses.replace(arm, command="another", perf=dataclasses.replace(arm.perf, update_ms=1.0))
    wider = dataclasses.replace(arm, perf=dataclasses.replace(arm.perf, ratio_high=1.6))
    assert plots.loss_plot(arm, "device") == plots.loss_plot(more, "device")
    one, same, other = (plots.ratio_plot([synthetic.reference(), record], record, "device") for record in (arm, more, wider))
    assert plots.same_image(one, same) and not plots.same_image(one, other)


def test_the_same_pixels_compressed_otherwise_are_the_same_plot():
    one = plots.loss_plot(synthetic.record(), "device")
    assert plots.same_image(one, saved_again(one)) and saved_again(one) != one
    assert not plots.same_image(one, saved_again(one, painted=True))
    assert not plots.same_image(one, one[:2000])


def saved_again(data: bytes, painted: bool = False) -> bytes:
    from PIL.PngImagePlugin import PngInfo

    image, info, buffer = Image.open(io.BytesIO(data)), PngInfo(), io.BytesIO()
    info.add_text(plots.DIGEST, image.info[plots.DIGEST])
    if painted:
        image.paste((200, 30, 30, 255), (500, 300, 503, 303))
    image.save(buffer, format="png", compress_level=1, pnginfo=info)
    return buffer.getvalue()


def test_stale_files_go_and_files_of_others_stay(tmp_path):
    data = write(tmp_path, [synthetic.record("first"), synthetic.record("second")])
    render(data, tmp_path)
    (data / SLUG / "run.jsonl").unlink()
    write(tmp_path, [synthetic.record("first")])
    kept = [tmp_path / SLUG / "notes.md", tmp_path / SLUG / "photo.png", tmp_path / "other" / "shipping.toml"]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine")
    assert differences(data, tmp_path) == [
        f"{SLUG}/README.md (differs)",
        f"{SLUG}/shipping.toml (differs)",
        f"{SLUG}/second.md (no record)",
        f"{SLUG}/second.png (no record)",
    ]
    render(data, tmp_path)
    assert not list((tmp_path / SLUG).glob("second.*")) and all(path.read_bytes() == b"mine" for path in kept)
    assert differences(data, tmp_path) == []


def test_a_device_whose_records_are_gone_loses_its_report(tmp_path):
    data = write(tmp_path, [synthetic.record()])
    render(data, tmp_path)
    (data / SLUG / "run.jsonl").unlink()
    render(data, tmp_path)
    assert not list((tmp_path / SLUG).iterdir())
    assert "No records yet" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_broken_record_leaves_the_old_report_alone(tmp_path):
    data = write(tmp_path, [synthetic.record()])
    render(data, tmp_path)
    before = (tmp_path / SLUG / "README.md").read_bytes()
    with (data / SLUG / "run.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"run_id": "torn')
    with pytest.raises(UserError, match=r"run\.jsonl:2: "):
        render(data, tmp_path)
    assert (tmp_path / SLUG / "README.md").read_bytes() == before


def test_a_record_in_the_wrong_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="belongs in the folder 'example-gpu-x1', not 'another-gpu'"):
        render(write(tmp_path, [synthetic.record()], "another-gpu"), tmp_path)


def test_a_time_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="finished_at 'yesterday' is not an ISO 8601 time"):
        render(write(tmp_path, [synthetic.record(finished_at="yesterday")]), tmp_path)


def test_one_arm_and_nothing_else(tmp_path):
    lone = synthetic.record(
        environment={}, recipe={}, data={}, command="", summary="", losses=(), exactness="", why_exact=""
    )
    render(write(tmp_path, [dataclasses.replace(lone, verdict=Verdict(Level.NOT_RUN, "no GPU"))]), tmp_path)
    readme = (tmp_path / SLUG / "README.md").read_text(encoding="utf-8")
    assert "Nothing ships here yet" in readme and "Nothing was timed in this run" in readme
    assert not list(tmp_path.rglob("*.png"))


def test_two_devices_share_an_index(tmp_path):
    other = {"device": "Other GPU", "device_slug": "other-gpu"}
    failed = synthetic.record(level=Level.FAILED, environment=other)
    write(tmp_path, [failed], "other-gpu")
    together = synthetic.record("all", role="combination", perf=synthetic.perf(1.23))
    render(write(tmp_path, [synthetic.reference(), together]), tmp_path)
    index = tables((tmp_path / "README.md").read_text(encoding="utf-8"))[0]
    trained = "qwen3.5-tiny · LoRA r=16 · bfloat16 · pack length 512 · 30 steps"
    assert [row[:4] for row in index[1:]] == [
        ["Example GPU X1", trained, "silu_mul + static_lora", "1.23x [1.21, 1.25]"],
        ["Other GPU", trained.replace("bfloat16", "auto"), "nothing: see the report", "–"],
    ]


def test_updates_have_a_column_where_one_was_timed(tmp_path):
    def page(reports: Path, *found: records.Record) -> tuple[list[str], dict[str, list[str]]]:
        render(write(reports, list(found)), reports)
        rows = next(t for t in tables((reports / SLUG / "README.md").read_text()) if "MFU" in t[0])
        return rows[0], {row[0]: row for row in rows[1:]}

    timed = {
        "update_ms": 1.3,
        "update_ratio": 5.8,
        "update_ratio_low": 5.7,
        "update_ratio_high": 5.9,
        "update_in_step": True,
    }
    stock = synthetic.reference()
    equal = {"update_ratio": 1.0, "update_ratio_low": 1.0, "update_ratio_high": 1.0}
    own = dataclasses.replace(stock.perf, update_ms=7.6, update_in_step=True, **equal)
    arms = [
        synthetic.record(name, Level.ROUNDING, perf=synthetic.perf(1.5, **more)) for name, more in (("a", timed), ("b", {}))
    ]
    one, other = tmp_path / "one", tmp_path / "other"
    header, rows = page(one, dataclasses.replace(stock, perf=own), *arms)
    place = header.index("update")
    assert [rows[name][place] for name in ("stock", "a", "b")] == ["7.6 ms", "1.3 ms, 5.80x [5.70, 5.90]", "–"]
    assert "5.80x [5.70, 5.90]" in (one / SLUG / "a.md").read_text()
    assert "update of the weights |" not in (one / SLUG / "b.md").read_text()
    header, _ = page(other, stock, arms[1])
    assert "update" not in header and "update of the weights" not in (other / SLUG / "README.md").read_text()


def test_an_update_that_was_timed_by_itself_says_so(tmp_path):
    def page(name: str, in_step: bool) -> str:
        perf = synthetic.perf(1.5, update_ms=6.7, update_ratio=1.05, update_ratio_low=1.0, update_ratio_high=1.2)
        perf = dataclasses.replace(perf, update_in_step=in_step)
        render(
            write(tmp_path / name, [synthetic.reference(), synthetic.record("a", Level.ROUNDING, perf=perf)]),
            tmp_path / name,
        )
        return (tmp_path / name / SLUG / "README.md").read_text()

    before, now = page("before", False), page("now", True)
    assert "6.7 ms by itself, 1.05x" in before and "on a device at rest" in before
    assert "6.7 ms, 1.05x" in now and "by itself" not in now.lower() and "adds to a micro-step" in now
