"""compute-sanitizer's output is read right, and nothing passes that was not proved; the real tool runs on a GPU."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from abtest import sanitize, sanitize_child
from abtest.opcheck import small_workloads
from abtest.sanitize import TOOLS, places, read_log
from kernels import registry
from kernels.contract import Op, Workload
from loop.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
GPU = torch.cuda.is_available()
ANSWER = '{"workloads": 4}\n'
CLEAN = f"========= COMPUTE-SANITIZER\n{ANSWER}========= ERROR SUMMARY: 0 errors\n"
OUT_OF_BOUNDS = f"""========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at _forward_kernel+0x1b0 in kernel.py:55
=========     by thread (31,0,0) in block (3,0,0)
=========     Access at 0x7f00 is out of bounds
=========     Host Frame: cuLaunchKernelEx [0x38f5d4] in libcuda.so.1
{ANSWER}========= ERROR SUMMARY: 2 errors
"""
OF_PYTORCH = f"""========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::reduce_kernel<(int)512, float>(T3)+0x2d0
{ANSWER}========= ERROR SUMMARY: 1 error
"""
RACE = f"""========= COMPUTE-SANITIZER
========= Warning: Race reported between Write access at _kernel+0x150 in a.py:9 and Read access at _other+0x1a0 in a.py:11
{ANSWER}========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)
"""


def test_a_clean_log_passes():
    check = read_log("memcheck", 0, CLEAN)
    assert check.passed and check.value == 0.0 and check.detail == "4 workloads"
    assert read_log("racecheck", 0, CLEAN.replace("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed "
                                                  "(0 errors, 0 warnings)")).passed  # fmt: skip


@pytest.mark.parametrize(
    ("log", "count", "words"),
    [
        (OUT_OF_BOUNDS, 2, "2 errors: Invalid __global__ write of size 4 bytes at _forward_kernel+0x1b0 in kernel.py:55"),
        (RACE, 1, "Race reported between Write access at _kernel+0x150"),
        (CLEAN + OUT_OF_BOUNDS, 2, "_forward_kernel"),  # two processes, each with a summary
        (OUT_OF_BOUNDS + CLEAN, 2, "_forward_kernel"),
    ],
)
def test_errors_are_counted_and_the_first_one_is_told(log, count, words):
    check = read_log("a tool", 0, log)
    assert not check.passed and check.value == count and words in check.detail


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("", "no summary"),
        ("Traceback\nModuleNotFoundError: No module named 'x'\n========= ERROR SUMMARY: 0 errors\n", "No module named 'x'"),
        (ANSWER, "no summary"),
        (OUT_OF_BOUNDS.replace(ANSWER, "CUDA error: unspecified launch failure\n"), "_forward_kernel"),
        ("ended after 5 s", "ended after 5 s"),
    ],
)
def test_what_proves_nothing_does_not_pass(log, words):
    check = read_log("memcheck", 1, log)
    assert not check.passed and check.value is None and words in check.detail


def test_errors_of_kernels_that_err_in_the_reference_are_not_the_candidate_s():
    known = places(OF_PYTORCH)
    assert known == {"void at::native::reduce_kernel<(int)512, float>(T3)"}
    assert places(RACE) == {"_kernel", "_other"}
    assert read_log("initcheck", 0, OF_PYTORCH, known).passed
    assert "reduce_kernel" in read_log("initcheck", 0, OF_PYTORCH, known).detail
    both = read_log("initcheck", 0, OF_PYTORCH + OUT_OF_BOUNDS, known)
    assert not both.passed and "_forward_kernel" in both.detail


CONCATENATION = OF_PYTORCH.replace(
    "reduce_kernel<(int)512, float>(T3)", "<unnamed>::CatArrayBatchedCopy<Opaque<2>, (int)4>(T1)"
)


def test_only_templates_of_pytorch_that_err_in_the_control_are_put_down_to_it():
    found, own = places(CONCATENATION), places(OUT_OF_BOUNDS)
    other = frozenset({"void at::native::<unnamed>::CatArrayBatchedCopy<Opaque<16>, (int)1>(T9)"})
    assert sanitize.of_pytorch(found | own, other | own) == found
    assert sanitize.of_pytorch(found, places(OF_PYTORCH)) == frozenset()


@pytest.mark.parametrize(("control", "passes"), [(CONCATENATION, True), (OF_PYTORCH, False), (CLEAN, False)])
@pytest.mark.skipif(GPU, reason="the real tool is tried below")
def test_what_pytorch_alone_is_told_off_for_is_not_the_candidate_s(tmp_path, monkeypatch, control, passes):
    logs = {"clean": CLEAN, "initcheck": CONCATENATION, "reference initcheck": CLEAN, "control initcheck": control}
    fake_tool(tmp_path, monkeypatch, **logs)
    monkeypatch.setattr(sanitize, "_repeats", lambda *arguments: read_log("repeats", 0, CLEAN))  # they are run below
    (_, check) = sanitize.sanitize(registry.discover()["silu_mul"], ("initcheck",), repeats=2)
    assert check.passed is passes and "CatArrayBatchedCopy" in check.detail


def test_the_control_reads_products():
    assert sanitize_child.control(CPU) == {"workloads": 10 * len(sanitize_child.CONTROL_SIZES)}


def fake_tool(tmp_path: Path, monkeypatch, **logs: str) -> list[list[str]]:
    """A compute-sanitizer that prints `logs`, by side or tool, and runs nothing; the calls it will have got."""
    calls = tmp_path / "calls"
    script = tmp_path / "compute-sanitizer"
    script.write_text(
        f"#!{sys.executable}\nimport sys\nlogs = {logs!r}\nopen({str(calls)!r}, 'a').write(' '.join(sys.argv) + '\\n')\n"
        "print(logs.get(sys.argv[-1] + ' ' + sys.argv[2]) or logs.get(sys.argv[2], logs['clean']))\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return calls


@pytest.mark.skipif(GPU, reason="the real tool is tried below")
def test_each_tool_watches_the_op_and_the_reference_is_asked_only_for_errors(tmp_path, monkeypatch):
    logs = {"clean": CLEAN, "initcheck": OF_PYTORCH, "candidate racecheck": RACE}
    calls = fake_tool(tmp_path, monkeypatch, **logs)
    checks = sanitize.sanitize(registry.discover()["silu_mul"], repeats=2)
    assert [(check.name, check.passed) for check in checks] == [
        ("2 repeats have the same bits", True), ("memcheck", True), ("initcheck", True), ("racecheck", False),
    ]  # fmt: skip
    asked = [line.split() for line in calls.read_text().splitlines()]
    assert [(words[2], words[-1]) for words in asked] == [
        ("memcheck", "candidate"), ("initcheck", "candidate"), ("initcheck", "reference"),
        ("racecheck", "candidate"), ("racecheck", "reference"),
    ]  # fmt: skip
    assert all("abtest.sanitize_child silu_mul once" in " ".join(words) for words in asked)
    huge = sanitize.beyond_int32(registry.discover()["silu_mul"])
    assert huge == ([], ["beyond 2^31 elements needs a GPU"])  # the child has none, whatever this process was made to say


@pytest.mark.skipif(GPU, reason="says what a machine without a GPU gets")
def test_the_command_prints_a_table_and_says_what_did_not_run(tmp_path, monkeypatch, capsys):
    fake_tool(tmp_path, monkeypatch, clean=CLEAN)
    answers = {
        "repeat": {"workloads": 4, "different": []},
        "huge": sanitize_child.huge(registry.discover()["silu_mul"].op, CPU),
    }
    monkeypatch.setattr(sanitize, "_child", lambda name, task, *rest, timeout: (answers[task], ""))  # it is run above
    monkeypatch.setattr(registry, "unmet", lambda needs, device: "needs a newer card" if needs.cuda else None)
    monkeypatch.setenv("COLUMNS", "200")
    code = sanitize.main(["--optimization", "silu_mul", "keep_activations", "ssm_fast_path", "--repeats", "2"])
    table = capsys.readouterr().out
    assert code == 0
    for words in ("memcheck", "racecheck", "beyond 2^31 elements needs a GPU", "no op of its own", "needs a newer card"):
        assert words in table
    fake_tool(tmp_path, monkeypatch, **{"clean": CLEAN, "candidate memcheck": OUT_OF_BOUNDS})
    assert sanitize.main(["--optimization", "silu_mul", "--repeats", "2"]) == 1
    assert "WRONG" in capsys.readouterr().out
    fake_tool(tmp_path, monkeypatch, clean=CLEAN)
    answers["repeat"]["different"] = ["1 of 2 in small, float32"]
    assert sanitize.main(["--optimization", "silu_mul", "--repeats", "2"]) == 1
    table = capsys.readouterr().out
    assert table.count("WRONG") == 1 and "1 of 2 in small" in table


@pytest.mark.skipif(GPU, reason="says what a machine without a GPU gets")
def test_without_a_gpu_there_is_one_line_and_status_2():
    words = [sys.executable, "-m", "abtest.sanitize", "--optimization", "silu_mul"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: compute-sanitizer needs a CUDA device") and done.stderr.count("\n") == 1


def test_without_the_tool_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitize, "USUAL_PLACES", ())
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="not on the PATH"):
        sanitize.find_sanitizer()
    with pytest.raises(UserError, match="at least 2"):
        sanitize.main(["--repeats", "1"])


def test_an_unknown_name_is_a_mistake():
    with pytest.raises(UserError, match="no optimization is named 'nothing'"):
        sanitize.main(["--optimization", "nothing"])


def test_the_child_finds_results_that_do_not_repeat():
    def inputs(workload: Workload, device: torch.device, seed: int):
        return (torch.ones(workload.shape["T"], dtype=getattr(torch, workload.dtype)).requires_grad_(),)

    calls = iter(range(1000))
    small = Workload("small", {"T": 4}, "float32", small=True)
    op = Op(lambda x: x.exp(), lambda x: x.exp() + (next(calls) == 3), inputs, (small,), lambda w: 1, lambda w: 1)
    assert sanitize_child.repeat(op, "reference", CPU, 5) == {"workloads": 2, "different": []}
    assert sanitize_child.repeat(op, "candidate", CPU, 5)["different"] == ["1 of 5 in small, float32"]
    assert sanitize_child.once(op, "candidate", CPU) == {"workloads": 2}
    assert [workload.dtype for workload in small_workloads(op)] == ["float32", "bfloat16"]


def test_the_child_prints_one_document(capsys):
    sanitize_child.main(["static_lora", "once", "candidate"])
    assert json.loads(capsys.readouterr().out) == {"workloads": 4}


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, one in registry.discover().items() if one.op is not None])
def test_every_op_is_clean(name):
    optimization = registry.discover()[name]
    if not GPU:
        pytest.skip("compute-sanitizer needs a CUDA device")
    reason = sanitize.cannot(optimization)
    if reason:
        pytest.skip(reason)
    checks = sanitize.sanitize(optimization)
    assert [check.name for check in checks[1:]] == list(TOOLS)
    assert all(check.passed for check in checks), checks
