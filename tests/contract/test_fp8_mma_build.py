"""fp8_mma's CUDA kernel: what its build needs and says when it fails, and what it compiles to for GPUs that are not here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.cross_compile.run import compile_cases
from negative_results.fp8_mma import mma

ROOT = Path(__file__).resolve().parents[2]


def test_tools_that_are_missing_are_named(monkeypatch, tmp_path):
    extension = pytest.importorskip("torch.utils.cpp_extension")
    monkeypatch.setattr(extension, "is_ninja_available", lambda: False)
    assert "ninja, which is not installed" in mma.missing_tool("sm_121a")
    monkeypatch.setattr(extension, "is_ninja_available", lambda: True)
    monkeypatch.setattr(extension, "get_cxx_compiler", lambda: "no-such-compiler")
    assert "no-such-compiler is not installed" in mma.missing_tool("sm_121a")
    monkeypatch.setattr(extension, "get_cxx_compiler", lambda: sys.executable)
    monkeypatch.setattr(extension, "CUDA_HOME", None)
    assert "no CUDA toolkit was found" in mma.missing_tool("sm_121a")
    monkeypatch.setattr(extension, "CUDA_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho sm_89; echo sm_90\n", encoding="utf-8")
    nvcc.chmod(0o755)
    assert mma.missing_tool("sm_121a") == f"its CUDA kernel needs an nvcc that knows sm_121a, and {nvcc} does not"
    assert mma.missing_tool("sm_90a") is None
    monkeypatch.setattr(mma, "_cpp_extension", lambda: None)
    assert "setuptools" in mma.missing_tool("sm_121a")


def test_a_build_that_fails_is_a_reason(monkeypatch):
    def failing(target):
        raise RuntimeError("Error building extension\n[1/2] nvcc product.cu\nproduct.cu(3): error: no such thing\n")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 1))
    monkeypatch.setattr(mma, "missing_tool", lambda target: None)
    monkeypatch.setattr(mma, "_library", failing)
    want = "its CUDA kernel can't be built for sm_121a: product.cu(3): error: no such thing"
    assert mma.unavailable(torch.device("cuda")) == want
    monkeypatch.setattr(mma, "_library", lambda target: None)
    assert mma.unavailable(torch.device("cuda")) is None


def test_importing_it_builds_and_loads_nothing():
    unwanted = {"triton", "peft", "torch.utils.cpp_extension"}
    code = f"import sys, negative_results.fp8_mma; print(sorted({unwanted} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "[]\n"


def test_it_compiles_to_what_is_expected_for_every_target():
    outcomes = compile_cases(("fp8_mma",))
    assert {outcome.target for outcome in outcomes} == {"sm_80", "sm_90a", "sm_120a", "sm_121a"}
    assert [f"{outcome.case}, {outcome.target}: {outcome.faults}" for outcome in outcomes if outcome.faults] == []
    products = [outcome for outcome in outcomes if outcome.kernel.startswith("product.cu")]
    assert len(products) == 6 and all(outcome.passed or outcome.skipped for outcome in products)


def test_ada_has_e4m3_products_too_and_adds_their_sums_in_fp32(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed here")
    from bench.cross_compile import binary, compilers
    from negative_results.fp8_mma.cross_compile import CASES, RING, STEPS

    case = next(case for case in CASES if case.name.startswith("product, bf16"))
    code = compilers.with_nvcc(case, "sm_89", tmp_path)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(code.cubin)
    found, sass = binary.resources(cubin, code.entry, 89), binary.sass_instructions(cubin, code.entry)
    assert found["registers"] <= 255 and found["spill_bytes"] == 0 and found["shared_bytes"] == RING
    assert sum("QMMA.16832.F32.E4M3.E4M3" in line for line in sass) >= STEPS
    assert sum("FADD" in line for line in sass) >= 4 * 4 * 4, "each of a warp's sums leaves the tensor core"
