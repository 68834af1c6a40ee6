"""Every tile that the tuner may choose; the first plain one and the first specialised one in each layout that a linear
layer's products have in memory.

sm_80 has no TMA, and the folder does not run there; one case shows what Triton makes of the kernel without it.
"""

from __future__ import annotations

from kernels.cross_compile import CompileCase, Expected, Instruction
from negative_results.sm121a_matmul.tile import FP32_TILE, GROUP_M, Tile

from . import kernel
from .tile import TILES

HOPPER, GB10 = ("sm_90a",), ("sm_120a", "sm_121a")
WITH_TMA = (*HOPPER, *GB10)
MEASURED = (*HOPPER, "sm_121a")  # sm_120a gets sm_121a's code; its first tile is a case
MMA = Instruction("mma.sync", r"^mma\.sync\S*\.bf16", ("sm_80", *GB10))
WGMMA = Instruction("wgmma", r"^wgmma\.mma_async\S*\.bf16", HOPPER)
LOADS = Instruction("cp.async.bulk.tensor, loads", r"cp\.async\.bulk\.tensor\.2d\.shared", WITH_TMA, least=2)
STORES = Instruction("cp.async.bulk.tensor, stores", r"cp\.async\.bulk\.tensor\.2d\.global", WITH_TMA)
NO_TMA = Instruction("cp.async.bulk.tensor", r"cp\.async\.bulk\.tensor", ("sm_80",), least=0, most=0)
# Warps that issue loads give registers to those that multiply: the sign that the compiler did specialise.
REGISTERS_MOVE = r"^setmaxnreg"
# By layout: whether A is held as [K, M], whether B is held as [N, K], and what is the number of rows of x.
LAYOUTS = {"y = x W^T": (False, True, "M"), "dx = dy W": (False, False, "M"), "dW = dy^T x": (True, False, "K")}
NUMBERS = ("M", "N", "K", "a_row", "b_row", "c_row")


def _expected(tile: Tile) -> Expected:
    """Hopper's specialisation takes products of 4 warps only: with 8 the kernel is compiled as if it were not asked for."""
    on = () if not tile.specialised else GB10 if tile.warps > 4 else WITH_TMA
    off = tuple(target for target in WITH_TMA if target not in on)
    moved = [Instruction("setmaxnreg", REGISTERS_MOVE, on, least=2)] if on else []
    kept = [Instruction("setmaxnreg", REGISTERS_MOVE, off, least=0, most=0)] if off else []
    return Expected(255, instructions=(MMA, WGMMA, LOADS, STORES, NO_TMA, *moved, *kept))


def _case(
    layout: str, tile: Tile, dtype: str = "bf16", ragged: bool = False, targets: tuple[str, ...] = WITH_TMA, expected=None
) -> CompileCase:
    """ragged: a number of rows that nothing divides; features are multiples of 16 in every model."""
    BM, BN, BK, warps, stages, specialised = tile
    a_is_km, b_is_nk, rows = LAYOUTS[layout]
    blocks = {"BM": BM, "BN": BN, "BK": BK, "GROUP": GROUP_M, "SPECIALISED": specialised}
    return CompileCase(
        name=f"{layout}, {tile}, {dtype}{', ragged' if ragged else ''}",
        kernel=kernel._matmul_kernel,
        signature={name: f"*{dtype}" for name in ("p_a", "p_b", "p_c")} | dict.fromkeys((*NUMBERS, "programs"), "i32"),
        expected=expected or _expected(tile),
        constexprs=blocks | {"A_IS_KM": a_is_km, "B_IS_NK": b_is_nk},
        multiples_of_16=tuple(name for name in NUMBERS if not (ragged and name == rows)),
        options={"num_warps": warps, "num_stages": stages},
        targets=targets,
    )


CASES = (
    _case("y = x W^T", TILES[0], targets=(*WITH_TMA, "sm_80")),
    *(_case("y = x W^T", tile, targets=MEASURED) for tile in TILES[1:]),
    *(_case(layout, tile, targets=MEASURED) for layout in LAYOUTS if layout != "y = x W^T" for tile in (TILES[0], TILES[4])),
    *(_case(layout, TILES[4], ragged=True, targets=("sm_121a",)) for layout in LAYOUTS),
    _case("y = x W^T", FP32_TILE, "fp32", expected=Expected(255, instructions=(LOADS, STORES)), targets=("sm_121a",)),
)
