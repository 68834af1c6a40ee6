"""The gate's part of the reports: rendered from the records alone, by the same command as the rest."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import synthetic_gates as gates
import synthetic_records as synthetic
from markdown_it import MarkdownIt
from PIL import Image
from rendered import tables

from abtest.report import append_gate, files, render, write_sensitivity
from abtest.report import records as gate_records
from abtest.verdict import Check, Level, Verdict
from bench import records
from bench import report as whole

ROOT = Path(__file__).resolve().parents[2]
SLUG = gates.SLUG
PAGE = Path("gate") / SLUG / "silu_mul.qwen3.5-tiny.lora.md"
WEIRD = 'a|b\n<script> `c` ``d`` "e" $x_1$ \\ ](http://e) 漢字 **f** __g__'


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    """A report of both kinds of data, rendered once; tests must not change it."""
    return gates.rendered(tmp_path_factory.mktemp("gate") / "reports")


def test_rendering_elsewhere_gives_the_same_bytes(full, tmp_path):
    """Another process, folder, hash seed and matplotlibrc; into an empty folder."""
    (tmp_path / "matplotlibrc").write_text("font.size: 31\nsavefig.dpi: 20\n", encoding="utf-8")
    for path in (full / "data").rglob("*.json*"):
        target = tmp_path / "data" / path.relative_to(full / "data")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    code = "from pathlib import Path; from abtest.report import render; render(Path('data'), Path('.'))"
    environment = os.environ | {
        "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C", "PYTHONPATH": str(ROOT), "MATPLOTLIBRC": str(tmp_path),
    }  # fmt: skip
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=120)
    made = {path.relative_to(tmp_path): path.read_bytes() for path in (tmp_path / "gate").rglob("*") if path.is_file()}
    assert made == {path.relative_to(full): path.read_bytes() for path in (full / "gate").rglob("*") if path.is_file()}
    assert sum(path.suffix == ".png" for path in made) == 3


def test_rendering_again_touches_nothing(full):
    before = {path: path.stat().st_mtime_ns for path in full.rglob("*") if path.is_file()}
    render(full / "data", full)
    assert before == {path: path.stat().st_mtime_ns for path in full.rglob("*") if path.is_file()}


def test_every_link_and_image_leads_to_a_file(full):
    for path in full.rglob("*.md"):
        for token in MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8")):
            for child in token.children or ():
                target = child.attrGet("href") or child.attrGet("src")
                assert target is None or (path.parent / str(target)).is_file(), (path, target)


def test_every_plot_is_a_readable_image(full):
    for path in full.rglob("*.png"):
        image = Image.open(io.BytesIO(path.read_bytes()))
        assert image.width >= 600 and image.height >= 300
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20  # something is drawn


def test_names_and_words_that_need_escapes(tmp_path):
    census = {"reference": {WEIRD: 1}, "candidate": {WEIRD: 2}, "new": [WEIRD], "gone": [WEIRD]}
    trace = ({"module": WEIRD, "phase": "forward", "same_bits": False, "relative": math.nan, "beside": math.inf},)
    record = gates.gate_record(
        WEIRD, Level.FAILED, verdict=Verdict(Level.FAILED, WEIRD, (Check(WEIRD, math.nan, None, False, WEIRD, 2, WEIRD),)),
        environment={"device": WEIRD, WEIRD: WEIRD}, recipe={"model": WEIRD, "method": WEIRD}, data={WEIRD: {WEIRD: WEIRD}},
        summary=WEIRD, why_exact=WEIRD, planted=WEIRD, claim=WEIRD, command=WEIRD, notes=(WEIRD,),
        census=census, trace=trace,
        op=({"op": WEIRD, "workload": WEIRD, "seed": 0, "level": "FAILED", "reason": WEIRD},), autotune={WEIRD: WEIRD},
        seconds={WEIRD: math.inf}, run_id=WEIRD,
    )  # fmt: skip
    append_gate(tmp_path / "data", SLUG, record)
    odd = {
        "family": WEIRD,
        "layer": WEIRD,
        "unit": WEIRD,
        "modelled_on": WEIRD,
        "reason": WEIRD,
        "values": {WEIRD: math.nan},
    }
    lines = [gates.line(WEIRD, (WEIRD,), **odd), gates.line(f"{WEIRD}2", (), **odd), gates.benign(WEIRD, **odd)]
    lines.append(gates.line(f"{WEIRD}3", (), equivalent=True, **odd))
    facts = {"limits": {WEIRD: 1.0}, "carrier": [WEIRD], "command": WEIRD, "environment": {"device": WEIRD}}
    sweep = [{"where": WEIRD, "method": "full", "scale": 0.1, "caught": False, "caught_by": []}]
    gates.measured(tmp_path, lines, sweep, **facts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that the font lacks is a warning
        render(tmp_path / "data", tmp_path)
    plain = " ".join(WEIRD.split())
    pages = list((tmp_path / "gate").rglob("*.md"))
    assert len(pages) == 2
    for path in pages:
        markdown = path.read_text(encoding="utf-8")
        for rows in tables(markdown):
            assert {len(row) for row in rows} == {len(rows[0])}
        assert "<script>" not in MarkdownIt("commonmark").enable("table").render(markdown)
    readme = (tmp_path / "gate" / "README.md").read_text(encoding="utf-8")
    assert gates.table(readme, "modelled on")[1][:3] == [plain, plain, plain]
    page = next(path for path in pages if path.parent.name == SLUG).read_text(encoding="utf-8")
    assert [plain, "nan", "–", "FAIL", plain, plain] in [row for rows in tables(page) for row in rows]


def test_no_data_is_nothing_rendered(tmp_path):
    assert files(tmp_path / "data") == {} and render(tmp_path / "data", tmp_path) == []
    (tmp_path / "data" / "gate" / "runs").mkdir(parents=True)
    write_sensitivity(tmp_path / "data", SLUG, [], gates.facts(), [])
    assert render(tmp_path / "data", tmp_path) == [] and not (tmp_path / "gate").exists()


def test_one_command_renders_and_checks_both(tmp_path):
    data = gates.measured(tmp_path)
    append_gate(data, SLUG, gates.gate_record())
    records.append(data / SLUG / "run.jsonl", synthetic.record())
    made = whole.render(data, tmp_path)
    assert {Path("README.md"), Path(SLUG) / "README.md", Path("gate/README.md"), PAGE} <= set(made)
    index = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "](gate/README.md)" in index and len(gates.table(index, "device")) == 2  # the folder "gate" is no device
    assert whole.differences(data, tmp_path) == []
    (tmp_path / PAGE).unlink()
    (tmp_path / "gate" / "README.md").write_bytes(b"edited")
    assert whole.differences(data, tmp_path) == ["gate/README.md (differs)", f"{PAGE} (missing)"]


def test_stale_pages_go_and_files_of_others_stay(tmp_path):
    data = gates.measured(tmp_path)
    append_gate(data, SLUG, gates.gate_record())
    records.append(data / SLUG / "run.jsonl", synthetic.record())
    whole.render(data, tmp_path)
    kept = [tmp_path / "gate" / "notes.md", tmp_path / "gate" / SLUG / "photo.png", tmp_path / SLUG / "README.md"]
    for path in kept[:2]:
        path.write_bytes(b"mine")
    gate_records.path(data, SLUG).unlink()
    assert f"{PAGE} (no record)" in whole.differences(data, tmp_path)
    render(data, tmp_path)
    assert not (tmp_path / PAGE).exists() and all(path.is_file() for path in kept)
    (data / "gate" / f"{SLUG}.jsonl").unlink()
    whole.render(data, tmp_path)
    assert not (tmp_path / "gate" / "README.md").exists() and all(path.is_file() for path in kept)
    assert "gate/README.md" not in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_broken_line_is_one_line_and_status_2(tmp_path):
    data = gates.measured(tmp_path / "reports")
    path = data / "gate" / f"{SLUG}.jsonl"
    path.write_bytes(path.read_bytes() + b'{"kind": "mutant", \xf0\x9f')
    done = subprocess.run(
        [sys.executable, "-m", "bench.report"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    number = len(gates.outcome()) + 1
    assert done.returncode == 2 and f"reports/data/gate/{SLUG}.jsonl:{number}: not a valid record" in done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout and not (tmp_path / "reports" / "gate").exists()
