"""Every kernel compiles, for GPUs that are not here, to what its folder expects; and what does not is reported."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.cross_compile import folders, records
from bench.cross_compile.__main__ import main
from bench.cross_compile.records import Outcome
from bench.cross_compile.run import compile_cases
from kernels.cross_compile import SHARED_BYTES, TARGETS
from loop.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = folders.folders()
PLANTED = Path(__file__).with_name("planted_kernels")
JITTED = sorted(name for name, (package, folder) in FOLDERS.items() if folders.kernels_of(package, folder))
HAS_NVCC = shutil.which("nvcc") is not None
FAULTS = {  # of the planted cases, in the words of the report
    "registers": "registers a thread, more than 8",
    "spills": "bytes of stack and local memory a thread, more than 0",
    "shared memory": "bytes of shared memory a block, more than 512",
    "too large for the target": "bytes of shared memory a block, more than 101,376",
    "narrow": "loads and stores of less than 16 bytes a thread, more than 0",
    "no access": "no load or store of global memory was found",
    "missing": "mma.sync 0 times, not at least 1",
    "forbidden": "times, not none",
    "refused": "a block is too small",
    "deadly": "does not compile: the compiler was ended by SIGABRT",
    "argument": "does not compile: ValueError: each of the arguments p_x, p_y, size, BLOCK is expected once",
    "option": "does not compile: ValueError: Triton has no option 'num_warp'",
    "two of a name": "does not compile: ValueError: 2 kernels of product.cu have 'o' in their names",
    "nvcc refuses": "does not compile: RuntimeError: ",
}


@pytest.fixture(scope="module")
def compiled() -> list[Outcome]:
    return compile_cases()


def test_every_case_is_compiled_for_every_target_that_it_names(compiled):
    assert {outcome.optimization for outcome in compiled} == set(folders.declaring())
    assert {outcome.target for outcome in compiled} == set(TARGETS)
    assert {outcome.target: outcome.compiled_for for outcome in compiled if outcome.measured} == {t: t for t in TARGETS}
    assert HAS_NVCC or all(outcome.skipped == "nvcc is not installed here" for outcome in compiled if not outcome.measured)


def test_every_kernel_compiles_to_what_its_folder_expects(compiled):
    assert [f"{o.optimization}, {o.case}, {o.target}: {o.faults}" for o in compiled if o.faults] == []
    for outcome in compiled:
        assert outcome.limits["shared_bytes"] <= SHARED_BYTES[outcome.target]
        assert outcome.passed or outcome.skipped


@pytest.mark.parametrize("name", JITTED)
def test_every_triton_kernel_of_a_folder_has_cases(compiled, name):
    assert name in folders.declaring(), f"{name} has Triton kernels and no cross_compile.py"
    assert folders.uncovered(compiled, (name,)) == []


def test_the_folders_with_kernels_are_found():
    assert "silu_mul" in JITTED and "keep_activations" not in JITTED
    _, folder = FOLDERS["silu_mul"]
    names = ("_backward_kernel", "_forward_kernel")  # _sigmoid_and_silu and _accurate_exp are parts of them
    assert folders.kernels_of("kernels", folder) == [f"kernels.silu_mul.kernel.{name}" for name in names]


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """A checkout whose only kernels are the planted ones."""
    folder = tmp_path_factory.mktemp("planted")
    for package in ("loop", "abtest", "bench"):
        (folder / package).symlink_to(ROOT / package)
    for name in ("__init__.py", "contract.py", "registry.py", "cross_compile.py"):
        (folder / "kernels").mkdir(exist_ok=True)
        shutil.copy(ROOT / "kernels" / name, folder / "kernels" / name)
    (folder / "negative_results").mkdir()
    (folder / "negative_results" / "__init__.py").write_text('"""Nothing."""\n', encoding="utf-8")
    shutil.copytree(PLANTED, folder / "kernels" / "planted")
    return folder


def command(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a checkout; Triton would interpret there, and the command must not."""
    environment = os.environ | {"PYTHONPATH": str(folder), "TRITON_INTERPRET": "1"} | environment
    words = [sys.executable, "-m", "bench.cross_compile", *arguments]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def reported(planted) -> tuple[subprocess.CompletedProcess[str], list[Outcome]]:
    return command(planted), records.load(planted / "reports" / "data")


def by_case(outcomes: list[Outcome], case: str) -> list[Outcome]:
    found = [outcome for outcome in outcomes if outcome.case == case]
    if not HAS_NVCC and found[0].kernel.startswith("product.cu"):
        pytest.skip("nvcc is not installed here")
    return found


@pytest.mark.parametrize("case", FAULTS)
def test_what_is_not_as_expected_is_reported(planted, reported, case):
    done, outcomes = reported
    (outcome,) = by_case(outcomes, case)
    (fault,) = outcome.faults
    assert FAULTS[case] in fault and not outcome.passed
    assert done.returncode == 1 and f"planted ({case}) for {outcome.target}: {fault}" in done.stderr.splitlines()
    page = (planted / "reports" / "cross_compile" / "README.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if f" {case} | {outcome.target} " in line)
    assert "as expected" not in row
    assert "/tmp" not in page and str(planted) not in page


@pytest.mark.parametrize("case", ["copy", "product", "descriptor", "spills allowed", "CUDA C++"])
def test_what_is_as_expected_passes_on_every_target(reported, case):
    found = by_case(reported[1], f"right, {case}")
    assert [outcome.target for outcome in found] == (list(TARGETS) if case != "CUDA C++" else list(TARGETS[1:]))
    assert all(outcome.passed for outcome in found), [outcome.faults for outcome in found]


def test_instructions_are_counted_on_the_targets_that_have_them(reported):
    counts = {
        (count.name, outcome.target): count.found
        for case in ("product", "descriptor")
        for outcome in by_case(reported[1], f"right, {case}")
        for count in outcome.instructions
    }
    assert {target for name, target in counts if name == "mma.sync"} == {"sm_80", "sm_120a", "sm_121a"}
    assert {target for name, target in counts if name == "wgmma"} == {"sm_90a"}
    assert counts["mma.sync", "sm_80"] == 4 * 8 * 4 // 4  # 64 x 64 x 64 in products of 16 x 8 x 16, by four warps
    assert counts["cp.async.bulk.tensor", "sm_121a"] >= 2 and counts["cp.async.bulk.tensor", "sm_80"] == 0


def test_shared_memory_is_what_the_launch_needs(reported):
    (first, *_) = by_case(reported[1], "right, CUDA C++")
    assert first.measured["shared_bytes"] == 32 * 4 + 4096  # declared and asked for, without what the system reserves
    (large,) = by_case(reported[1], "shared memory")
    assert large.measured["shared_bytes"] >= 64 * 64 * 2


def test_a_kernel_without_a_case_is_named(reported):
    done, _ = reported
    assert "kernels.planted.kernel._forgotten_kernel: kernels/planted/cross_compile.py has no case of it for" in done.stderr
    missing = [line.split(":")[0].rpartition(".")[2] for line in done.stderr.splitlines() if "has no case of it" in line]
    assert missing == ["_deadly_kernel", "_forgotten_kernel", "_refused_kernel"]  # two are compiled for one target only


def test_one_optimization_is_compiled_as_among_all_and_nothing_is_written(compiled, tmp_path, capsys, monkeypatch):
    again = []

    def kept(names: tuple[str, ...]) -> list[Outcome]:
        again.extend(compile_cases(names))
        return again

    monkeypatch.setattr("bench.cross_compile.run.compile_cases", kept)
    reports = tmp_path / "reports"
    assert main(["--optimization", "triton_fp8_dot", "--reports", str(reports)]) == 0
    assert re.fullmatch(r"(\d+) of \1 compile to what their folders expect\n", capsys.readouterr().out)
    assert not reports.exists()
    with pytest.raises(UserError, match=r"no folder 'nobody' with a cross_compile\.py; there are: .*silu_mul"):
        main(["--optimization", "nobody"])
    before = [outcome for outcome in compiled if outcome.optimization == "triton_fp8_dot"]
    records.write(tmp_path / "one", before)
    records.write(tmp_path / "two", list(reversed(again)))
    assert records.path(tmp_path / "one").read_bytes() == records.path(tmp_path / "two").read_bytes()
    assert records.load(tmp_path / "one") == before


def test_a_broken_module_is_one_line(planted, tmp_path):
    broken = tmp_path / "checkout"
    shutil.copytree(planted, broken, symlinks=True, ignore=shutil.ignore_patterns("reports"))
    (broken / "kernels" / "planted" / "cross_compile.py").write_text("CASES = (nothing,)\n", encoding="utf-8")
    done = command(broken)
    assert done.returncode == 2
    assert done.stderr == "error: kernels.planted.cross_compile: NameError: name 'nothing' is not defined\n"
    assert not (broken / "reports").exists()


def test_without_triton_it_is_one_clear_line(planted, tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('no triton')\n", encoding="utf-8")
    done = command(planted, "--reports", str(tmp_path), PYTHONPATH=os.pathsep.join((str(tmp_path), str(planted))))
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "error: kernels are cross-compiled by Triton, which can't be imported here: no triton\n"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == ["triton.py"]
