"""Cases that are as expected (their names start with "right"), and cases that are not: each of these has one fault."""

from __future__ import annotations

import os
from pathlib import Path

from kernels.planted import kernel

from kernels.cross_compile import CompileCase, CudaCase, Expected, Instruction


class Deadly:
    """A constexpr that ends the process when Triton asks for its key, as a failed assertion in LLVM would."""

    @property
    def cache_key(self) -> str:
        os.abort()


ONE = ("sm_90a",)
ANY = Expected(registers=255)
COPY = {
    "kernel": kernel._copy_kernel,
    "signature": {"p_x": "*fp32", "p_y": "*fp32", "size": "i32"},
    "constexprs": {"BLOCK": 512},
}
PRODUCT = {
    "kernel": kernel._product_kernel,
    "signature": {"p_a": "*bf16", "p_b": "*bf16", "p_c": "*fp32"},
    "constexprs": {"BLOCK": 64},
}
DESCRIPTOR = {
    "kernel": kernel._descriptor_kernel,
    "signature": {"p_x": "*bf16", "p_y": "*bf16", "rows": "i32"},
    "constexprs": {"BLOCK": 64},
}
SPILLING = {
    "kernel": kernel._spilling_kernel,
    "signature": {"p_x": "*fp32", "p_y": "*fp32"},
    "constexprs": {"BLOCK": 4096},
    "options": {"num_warps": 1, "maxnreg": 40},
}
NO_HOPPER = ("sm_80", "sm_120a", "sm_121a")
WITH_TMA = ("sm_90a", "sm_120a", "sm_121a")
MMA = Instruction("mma.sync", r"^mma\.sync", NO_HOPPER)
WGMMA = Instruction("wgmma", r"^wgmma\.mma_async", ONE)
TMA = Instruction("cp.async.bulk.tensor", r"cp\.async\.bulk\.tensor", WITH_TMA, least=2)
NO_TMA = Instruction("cp.async.bulk.tensor", r"cp\.async\.bulk\.tensor", ("sm_80",), least=0, most=0)
QMMA = Instruction("QMMA e4m3", r"^QMMA\.16832\.F32\.E4M3\.E4M3", ("sm_120a", "sm_121a"), "sass", most=1)
HMMA = Instruction("HMMA", r"^HMMA\.16816", ONE, "sass", least=2)


def expecting(*instructions: Instruction) -> Expected:
    return Expected(registers=255, instructions=instructions)


def fp8(name: str, expected: Expected, kernel: str = "product", targets: tuple[str, ...] = ONE) -> CudaCase:
    return CudaCase(name, Path(__file__).with_name("product.cu"), kernel, expected, ("-O3",), 4096, targets)


CASES = (
    CompileCase("right, copy", expected=Expected(32, narrow_accesses=0, shared_bytes=0), multiples_of_16=("size",), **COPY),
    CompileCase("right, product", expected=expecting(MMA, WGMMA), **PRODUCT),
    CompileCase("right, descriptor", expected=expecting(TMA, NO_TMA), **DESCRIPTOR),
    CompileCase("right, spills allowed", expected=Expected(40, spill_bytes=65536), **SPILLING),
    fp8("right, CUDA C++", expecting(QMMA, HMMA), targets=WITH_TMA),
    CompileCase("registers", expected=Expected(registers=8), targets=ONE, **COPY),
    CompileCase("spills", expected=ANY, targets=ONE, **SPILLING),
    CompileCase("shared memory", expected=Expected(255, shared_bytes=512), targets=ONE, **DESCRIPTOR),
    CompileCase(
        "too large for the target", expected=ANY, targets=("sm_121a",), **DESCRIPTOR | {"constexprs": {"BLOCK": 256}}
    ),
    CompileCase("narrow", expected=Expected(255, narrow_accesses=0), targets=ONE, **COPY),
    CompileCase("no access", expected=Expected(255, narrow_accesses=0), targets=ONE, **DESCRIPTOR),
    CompileCase("missing", expected=expecting(Instruction("mma.sync", r"^mma\.sync")), targets=ONE, **PRODUCT),
    CompileCase("forbidden", expected=expecting(Instruction("wgmma", "^wgmma", least=0, most=0)), targets=ONE, **PRODUCT),
    CompileCase("refused", kernel._refused_kernel, {"p_x": "*i32"}, ANY, {"BLOCK": 16}, targets=ONE),
    CompileCase("deadly", kernel._deadly_kernel, {"p_x": "*i32"}, ANY, {"MODE": Deadly()}, targets=ONE),
    CompileCase("argument", expected=ANY, targets=ONE, **COPY | {"signature": {"p_x": "*fp32", "size": "i32"}}),
    CompileCase("option", expected=ANY, targets=ONE, options={"num_warp": 4}, **COPY),
    fp8("two of a name", ANY, kernel="o"),
    fp8("nvcc refuses", ANY, targets=("sm_80",)),
)
