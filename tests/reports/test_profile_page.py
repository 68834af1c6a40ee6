"""The page of profiles: rendered from its records alone, stock and sets side by side."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import synthetic_records as synthetic
from markdown_it import MarkdownIt
from rendered import tables

from abtest import jsonl
from bench import records as device_records
from bench.profile.memory import COUNTED
from bench.profile.records import ProfileRecord, busy_share, read
from bench.report import differences, render
from bench.report.profile_page import by_setting
from loop.errors import UserError

PAGE = Path("profile") / "README.md"
SLUG = "example-gpu-x1"
WEIRD = 'a|b\n<script> `c` "d" ](http://e) 漢字 **f** __g__'
RECIPE = {
    "model": "qwen3.5-2b", "method": "lora", "dtype": "bfloat16", "lora": {"rank": 128}, "data": {"pack_length": 5376},
}  # fmt: skip
NAMES = [
    {"name": "nvjet_hsh", "group": "matrix", "owner": None, "seconds": 0.06, "count": 380.5},
    {"name": "_forward_kernel", "group": "norm", "owner": "rms_norm", "seconds": 0.002, "count": 48},
    {"name": "stranger", "group": "other", "owner": None, "seconds": 0.001, "count": 1},
]
PHASE = {
    "wall_s": 0.1, "wall_low_s": 0.09, "wall_high_s": 0.12, "traced_wall_s": 0.15, "busy_s": 0.08,
    "groups": {"matrix": 0.06, "norm": 0.002, "other": 0.001}, "names": NAMES, "kernels": 6548, "copies": 12.5,
    "launches": 6548.0, "graph_launches": 0, "idle_s": 0.07,
    "gaps": [{"at_s": 0.01, "seconds": 0.03, "host": "cudaStreamSynchronize in aten::item"}],
    "idle_by": {"cudaStreamSynchronize in aten::item": 0.04},
}  # fmt: skip
MEMORY = {
    "trained": 250 << 20, "frozen": 4 << 30, "masters": 500 << 20, "moments": 1000 << 20, "gradients": 500 << 20,
    "activations": 9 << 30, "loss": 8 << 30, "rest": 1 << 20, "peak": 22 << 30, "reserved": 30 << 30,
    "counted_by": "allocator",
}  # fmt: skip
FRAMES = ["train_step (loop/training.py)", "silu (torch/nn/functional.py)"]
STACKS = {
    "samples": 500, "rate_hz": 100, "seconds": 5.0, "frames": FRAMES, "nodes": [[0, 0, 500], [1, 1, 125]],
    "own": [[FRAMES[0], 375], [FRAMES[1], 125]],
}  # fmt: skip
DATA = {
    "positions": 5376, "real_tokens": 5300, "supervised_tokens": 2650, "micro_steps_per_step": 1, "content_hash": "0123",
}  # fmt: skip


def result(*enabled: str, **changes: Any) -> dict[str, Any]:
    values = {
        "optimizations": list(enabled), "shipping": False, "recipe": RECIPE, "enabled": list(enabled), "refused": {},
        "data": DATA, "phases": {"micro_step": PHASE, "update": PHASE, "step": PHASE}, "memory": MEMORY, "stacks": STACKS,
    }  # fmt: skip
    return copy.deepcopy(values | changes)


def record(result: dict[str, Any], second: int = 0, slug: str = SLUG, **environment: Any) -> ProfileRecord:
    known = synthetic.ENVIRONMENT | {"device_slug": slug} | environment
    command = f"python -m bench.profile --record --optimizations {' '.join(result['enabled'])}"
    return ProfileRecord(f"2026-01-02T03:04:{second:02d}+00:00", command, known, result)


def rendered(reports: Path, *records: ProfileRecord) -> str:
    for one in records:
        jsonl.append(reports / "data" / "profile" / f"{one.environment['device_slug']}.jsonl", jsonl.dumps(one))
    render(reports / "data", reports)
    return (reports / PAGE).read_text(encoding="utf-8")


def test_stock_and_sets_stand_side_by_side(tmp_path):
    graphed = PHASE | {"busy_s": 0.096, "launches": 3, "graph_launches": 1, "groups": {"matrix": 0.05, "loss": 0.01}}
    phases = {"micro_step": graphed, "update": PHASE, "step": graphed}
    text = rendered(tmp_path, record(result("cuda_graphs", phases=phases), 1), record(result()))
    times, groups, owners, *_ = tables(text)
    assert times[0][:5] == ["set", "micro-step ms", "update ms", "step ms", "step busy"]
    assert times[1] == [
        "stock", "100", "100", "100", "80.0 %", "80.0 %", "6,548", "12", "6,548", "0", "22.0 GiB",
    ]  # fmt: skip
    assert times[2][0] == "cuda_graphs" and times[2][4:] == [
        "96.0 %", "96.0 %", "6,548", "12", "3", "1", "22.0 GiB",
    ]  # fmt: skip
    assert groups[0] == ["ms", "stock", "cuda_graphs"]
    assert ["matrix products", "60 (95.2 %)", "50 (83.3 %)"] in groups and ["softmax and loss", "–", "10 (16.7 %)"] in groups
    assert groups[-1] == ["sum", "63", "60"]
    assert ["kept for backward by the layers", "9.0 GiB", "9.0 GiB"] in owners
    assert "**96.0 %**" in text and "**80.0 %**" not in text  # the aim is 95 %


def test_it_says_whether_a_peak_counts_what_graphs_hold(tmp_path):
    older = rendered(tmp_path / "older", record(result()))
    newer = rendered(tmp_path / "newer", record(result(memory=MEMORY | {"counted_by": COUNTED})))
    assert "memory that graphs hold is in the last row alone" in older and "pools of graphs included" not in older
    assert "pools of graphs included" in newer and "in the last row alone" not in newer


def test_where_peaks_are_counted_in_two_ways_it_says_which_set_s_in_which(tmp_path):
    newer = result("silu_mul", memory=MEMORY | {"counted_by": COUNTED})
    text = rendered(tmp_path, record(result()), record(result("rms_norm", "silu_mul"), 1), record(newer, 2))
    (old,) = (line for line in text.splitlines() if "the last row alone" in line)
    (new,) = (line for line in text.splitlines() if "pools of graphs" in line)
    assert old.startswith("`stock`, `rms_norm + silu_mul`: Weights, moments")
    assert new.startswith("`silu_mul`: Weights, moments")
    alike = rendered(tmp_path / "alike", record(result()), record(result("rms_norm"), 1))
    assert any(line.startswith("Weights, moments") for line in alike.splitlines()) and "`stock`: Weights" not in alike


def test_details_of_a_set(tmp_path):
    text = rendered(tmp_path, record(result("rms_norm", refused={"fp8_mma": "needs capability 12.0 to 12.1"})))
    assert "On: `rms_norm`. Not enabled: `fp8_mma`: needs capability 12.0 to 12.1." in text
    assert "| `_forward_kernel` | norms and reductions | `rms_norm` | 2 | 3.2 % | 48 |" in text
    assert "| `stranger` | other |" in text
    assert "idles 70 ms of a step under the profiler, whose step takes 150 ms and not 100" in text
    assert "| `cudaStreamSynchronize in aten::item` | 10 | 30 |" in text
    assert "Most stacks end in `train_step (loop/training.py)` 75.0 %, `silu (torch/nn/functional.py)` 25.0 %." in text


def test_a_cpu_has_no_gaps_and_a_reason_may_stand_for_stacks(tmp_path):
    on_host = {name: PHASE[name] for name in ("wall_s", "wall_low_s", "wall_high_s", "traced_wall_s", "groups", "names")}
    phases = dict.fromkeys(("micro_step", "update", "step"), on_host | {"busy_s": None})
    sizes = MEMORY | {"rest": None, "reserved": None, "counted_by": "saved tensors"}
    text = rendered(tmp_path, record(result(phases=phases, memory=sizes, stacks={"missing": "py-spy is not installed"})))
    assert tables(text)[0][0] == ["set", "micro-step ms", "update ms", "step ms", "peak memory"]
    assert "No host stacks: py-spy is not installed." in text and "idle" not in text
    assert "their own time under the profiler" in text and not list((tmp_path / "profile").rglob("*.svg"))


def test_figures_are_there_and_named_by_setting_and_set(tmp_path):
    full = result(recipe=RECIPE | {"method": "full"})
    text = rendered(tmp_path, record(result()), record(result("silu_mul", "rms_norm")), record(full))
    found = sorted(str(path.relative_to(tmp_path / "profile")) for path in (tmp_path / "profile" / SLUG).iterdir())
    stem = f"{SLUG}/qwen3.5-2b-lora-5376-bfloat16"
    assert found == [
        f"{SLUG}/qwen3.5-2b-full-5376-bfloat16.png", f"{SLUG}/qwen3.5-2b-full-5376-bfloat16.stock.svg", f"{stem}.png",
        f"{stem}.silu_mul+rms_norm.svg", f"{stem}.stock.svg",
    ]  # fmt: skip
    for name in found:
        assert f"]({name})" in text


def test_the_newest_record_of_a_set_counts_and_names_are_unique():
    old, new = record(result("a", "b", "c"), 1, git_sha="old"), record(result("c", "b", "a"), 2, git_sha="new")
    shipped = record(result("a", "b", "d", shipping=True), 3)
    other = record(result("a", "b", "e"), 4)
    (sets,) = by_setting([new, old, shipped, other, record(result("a", "b")), record(result())]).values()
    assert [one.name for one in sets] == ["stock", "a + b", "together, 3", "what ships, 3", "together, 3 (2)"]
    assert sets[2].record.environment["git_sha"] == "new"


def test_names_and_words_that_need_escapes(tmp_path):
    names = [entry | {"name": WEIRD, "owner": WEIRD} for entry in NAMES]
    gaps = {"gaps": [{"at_s": 0, "seconds": 1e-3, "host": WEIRD}], "idle_by": {WEIRD: 1e-3}}
    phases = dict.fromkeys(("micro_step", "update", "step"), PHASE | {"names": names} | gaps)
    stacks = STACKS | {"frames": [WEIRD, "b"], "own": [[WEIRD, 1]]}
    recipe = RECIPE | {"model": WEIRD}
    odd = result(WEIRD, phases=phases, stacks=stacks, refused={WEIRD: WEIRD}, recipe=recipe)
    text = rendered(tmp_path, record(odd, device=WEIRD, git_sha=WEIRD))
    assert "<script>" not in MarkdownIt("commonmark").enable("table").render(text)
    for rows in tables(text):
        assert {len(row) for row in rows} == {len(rows[0])}
    assert all(path.name.isascii() for path in (tmp_path / "profile" / SLUG).iterdir())


def test_one_command_renders_and_checks_it_with_the_rest(tmp_path):
    data = tmp_path / "data"
    device_records.append(data / SLUG / "run.jsonl", synthetic.record())
    text = rendered(tmp_path, record(result()))
    index = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "](profile/README.md)" in index and len(tables(index)[0]) == 2  # the folder of profiles is no device
    assert differences(data, tmp_path) == []
    (drawn,) = (tmp_path / "profile").rglob("*.svg")
    drawn.write_text(drawn.read_text(encoding="utf-8").replace("500 samples", "501 samples"), encoding="utf-8")
    (tmp_path / PAGE).write_text(text.replace("80.0 %", "99.0 %"), encoding="utf-8")
    assert differences(data, tmp_path) == [f"{PAGE} (differs)", f"{drawn.relative_to(tmp_path)} (differs)"]
    (data / "profile" / f"{SLUG}.jsonl").unlink()
    render(data, tmp_path)
    assert not (tmp_path / PAGE).exists() and not drawn.exists()
    assert "profile/" not in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_record_is_read_as_it_was_written(tmp_path):
    made = record(result("silu_mul"))
    path = tmp_path / f"{SLUG}.jsonl"
    jsonl.append(path, jsonl.dumps(made))
    assert read(path) == [made]
    assert busy_share(made.result["phases"]["step"]) == pytest.approx(0.8)


def phase(**changes: Any) -> dict[str, Any]:
    return {"result": result(phases={"micro_step": PHASE, "update": PHASE, "step": PHASE | changes})}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"schema": 2}, "record schema 2 is not 1"),
        ({"finished_at": "yesterday"}, "Invalid isoformat"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"environment": {"device_slug": "other"}}, "it is of device 'other', which belongs in other.jsonl"),
        ({"environment": {}}, "no key 'device_slug'"),
        ({"result": result(phases={"micro_step": PHASE})}, "no key 'update'"),
        ({"result": result(data=DATA | {"positions": "many"})}, "positions is 'many'"),
        ({"result": result(memory=MEMORY | {"frozen": 1.5})}, "frozen is 1.5, not a whole number"),
        ({"result": result(memory=MEMORY | {"frozen": -1})}, "frozen is -1"),
        ({"result": result(stacks=STACKS | {"nodes": [[1, 0, 5]]})}, "belongs to no place of the tree"),
        ({"result": result(stacks=STACKS | {"nodes": [[0, 2, 5]]})}, "belongs to no place of the tree"),
        ({"result": result(stacks=STACKS | {"nodes": [[0, 0]]})}, "not enough values"),
        ({"result": result(shipping="yes")}, "shipping is 'yes', not true or false"),
        (phase(wall_s=0), "wall_s of step is 0; a step takes time"),
        (phase(busy_s="nan"), "busy_s is 'nan'"),
        (phase(groups={"matrices": 1.0}), "a group is 'matrices', not one of matrix,"),
        (phase(speed=1), "unknown key 'speed'"),
        (phase(gaps=[{"at_s": 1, "seconds": -1, "host": "x"}]), "seconds is -1"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path, changed, words):
    file = tmp_path / "data" / "profile" / f"{SLUG}.jsonl"
    file.parent.mkdir(parents=True)
    row = json.loads(jsonl.dumps(record(result())))
    file.write_text(f"{json.dumps(row)}\n{json.dumps(row | changed)}\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        render(tmp_path / "data", tmp_path)
    assert f"{file}:2: not a valid record: " in str(caught.value) and words in str(caught.value)
    assert not (tmp_path / PAGE).exists()
