"""The kernel of chunk_delta_backward: heads of 128 for Hopper, which it is for, and heads of 64 elsewhere."""

from __future__ import annotations

from kernels.cross_compile import CompileCase, Expected, Instruction

from .within import WARPS, chunk_backward_kernel

MMA = Instruction("mma.sync", r"^mma\.sync\S*\.bf16", ("sm_80", "sm_120a", "sm_121a"))
WGMMA = Instruction("wgmma", r"^wgmma\.mma_async\S*\.bf16", ("sm_90a",))
FP32 = ("g", "dg", "dbeta")
SIZES = ("H", "HV", "K", "V", "C")


def _type(argument: str) -> str:
    if argument == "scale":
        return "fp32"
    if argument in ("bounds", "chunks"):
        return "*i32"
    return "*fp32" if argument in FP32 else "*bf16"


def _case(width: int, spills: int, targets: tuple[str, ...]) -> CompileCase:
    """spills: bytes a thread, at most, as first compiled; to be weighed against other tiles where there is a GPU."""
    return CompileCase(
        name=f"chunks of 64, heads of {width}, bf16",
        kernel=chunk_backward_kernel,
        signature={argument: _type(argument) for argument in chunk_backward_kernel.arg_names if argument not in SIZES},
        expected=Expected(255, spill_bytes=spills, instructions=(MMA, WGMMA)),
        constexprs={"H": 16, "HV": 16, "K": width, "V": width, "C": 64},
        options={"num_warps": WARPS, "num_stages": 1},
        targets=targets,
    )


CASES = (_case(128, 200, ("sm_90a",)), _case(64, 900, ("sm_80", "sm_120a", "sm_121a")))
