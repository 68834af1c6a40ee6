"""The kernels of packed_attention as launches compile them, each GPU with its own tiles: Qwen3.5's heads of 256, Qwen3's of
128, four query heads to a key head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kernels.cross_compile import TARGETS, CompileCase, Expected, Instruction

from . import backward, forward, tiles

CAPABILITIES = {"sm_80": (8, 0), "sm_90a": (9, 0), "sm_120a": (12, 0), "sm_121a": (12, 1)}
QWEN35 = {"H": 8, "GROUP": 4, "D": 256, "BD": 256, "WINDOW": 0}
QWEN3 = {"H": 32, "GROUP": 4, "D": 128, "BD": 128, "WINDOW": 0}
MMA = Instruction("mma.sync", r"^mma\.sync\S*\.bf16", ("sm_80", "sm_120a", "sm_121a"))
WGMMA = Instruction("wgmma", r"^wgmma\.mma_async\S*\.bf16", ("sm_90a",))
WIDE_COPY = Instruction("cp.async of 16 bytes", r"cp\.async\.cg\.shared\.global .*, 0x10")
# One program of 8 warps on an SM, or two of 4: sums of half a register file leave nothing over, and must not spill, but for
# those that were timed on an H200 with what they spill.
PRODUCTS = Expected(255, instructions=(MMA, WGMMA, WIDE_COPY))
SPILLS = {"dq, Qwen3.5, 64 x 32, bf16": 72, "dkdv, Qwen3.5, 64 x 64, bf16": 240}  # bytes a thread
FP32 = {"p_lse", "p_delta"}


def _case(name: str, function, tile: tiles.Tile, targets: tuple[str, ...], parts: bool = False, **constexprs) -> CompileCase:
    """parts: dk and dv are parts of a sum, in fp32."""
    constexprs |= {"BM": tile.BM, "BN": tile.BN}
    others = [argument for argument in function.arg_names if argument not in constexprs]
    name = f"{name}, {tile.BM} x {tile.BN}, bf16"
    return CompileCase(
        name=name,
        kernel=function,
        signature={argument: _type(argument, parts) for argument in others},
        expected=replace(PRODUCTS, spill_bytes=SPILLS.get(name, 0)),
        constexprs=constexprs,
        multiples_of_16=tuple(argument for argument in others if argument == "T" or argument.endswith(("_t", "_h"))),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
        targets=targets,
    )


def _type(argument: str, parts: bool) -> str:
    if not argument.startswith("p_"):
        return "fp32" if argument.startswith("scale") else "i32"
    if argument in ("p_starts", "p_ends"):
        return "*i32"
    return "*fp32" if argument in FP32 or (parts and argument in ("p_dk", "p_dv")) else "*bf16"


def _cases() -> Iterator[CompileCase]:
    for model, shape, wanted in (("Qwen3.5", QWEN35, TARGETS), ("Qwen3", QWEN3, ("sm_90a", "sm_121a"))):
        for plan, targets in _plans(shape["D"], wanted):
            yield _case(f"forward, {model}", forward.forward_kernel, plan.forward, targets, **shape)
            yield _case(f"dq, {model}", backward.dq_kernel, plan.dq, targets, **shape)
            heads = plan.heads_of(shape["GROUP"])
            for which, tile in plan.dkdv.items():
                own = {"HEADS": heads, "DK": "dk" in which, "DV": "dv" in which}
                parts = heads < shape["GROUP"]
                yield _case(f"{which}, {model}", backward.dkdv_kernel, tile, targets, parts, **own, **shape)
    yield CompileCase(
        name="sum of dk and dv, bf16",
        kernel=backward.sum_kernel,
        signature={"p_parts": "*fp32", "p_sum": "*bf16", "rows": "i32"},
        expected=Expected(64, shared_bytes=0, narrow_accesses=0),
        constexprs={"PARTS": 4, "D": 256, "BR": 8, "BD": 256},
        multiples_of_16=("rows",),
    )


def _plans(D: int, wanted: tuple[str, ...]) -> list[tuple[tiles.Plan, tuple[str, ...]]]:
    """Every plan for heads of D, with those of the wanted targets that run it."""
    found: list[tuple[tiles.Plan, tuple[str, ...]]] = []
    for plan in (tiles.HOPPER, tiles.OTHERS):
        own = tuple(target for target in wanted if tiles.plan_for(CAPABILITIES[target], D) is plan[D])
        found.append((plan[D], own))
    return found


CASES = tuple(_cases())
