"""Every tile that the tuner may choose, for the GPU that they are made for; the first one for the others, too, and in each
layout that a linear layer's products have in memory."""

from __future__ import annotations

from kernels.cross_compile import TARGETS, CompileCase, Expected, Instruction

from . import kernel
from .tile import FP32_TILE, GROUP_M, TILES, Tile

MMA = Instruction("mma.sync", r"^mma\.sync\S*\.bf16", ("sm_80", "sm_120a", "sm_121a"))
WGMMA = Instruction("wgmma", r"^wgmma\.mma_async\S*\.bf16", ("sm_90a",))
WIDE_COPY = Instruction("cp.async of 16 bytes", r"cp\.async\.cg\.shared\.global .*, 0x10")
NARROW_COPY = Instruction("narrower cp.async", r"cp\.async\.ca\.", least=0, most=0)
PRODUCT = Expected(255, narrow_accesses=0, instructions=(MMA, WGMMA, WIDE_COPY, NARROW_COPY))
SIZES = ("M", "N", "K")
STRIDES = ("a_m", "a_k", "b_k", "b_n", "c_m")
# By layout the strides that are 1, which a launch hands to the compiler as that, and what is the number of rows of x.
LAYOUTS = {"y = x W^T": ("a_k", "b_k", "M"), "dx = dy W": ("a_k", "b_n", "M"), "dW = dy^T x": ("a_m", "b_n", "K")}


def _case(
    layout: str, tile: Tile, dtype: str = "bf16", ragged: bool = False, expected: Expected = PRODUCT,
    targets: tuple[str, ...] = TARGETS,
) -> CompileCase:  # fmt: skip
    """ragged: a number of rows that nothing divides; features are multiples of 16 in every model."""
    BM, BN, BK, warps, stages, _ = tile
    *ones, rows = LAYOUTS[layout]
    numbers = [name for name in (*SIZES, *STRIDES) if name not in ones]
    blocks = {"BM": BM, "BN": BN, "BK": BK, "GROUP": GROUP_M, "EVEN": not (ragged and rows == "K")}
    return CompileCase(
        name=f"{layout}, {tile}, {dtype}{', ragged' if ragged else ''}",
        kernel=kernel._matmul_kernel,
        signature={name: f"*{dtype}" for name in ("p_a", "p_b", "p_c")} | dict.fromkeys(numbers, "i32"),
        expected=expected,
        constexprs=blocks | dict.fromkeys(ones, 1),
        multiples_of_16=tuple(name for name in numbers if not (ragged and name == rows)),
        options={"num_warps": warps, "num_stages": stages},
        targets=targets,
    )


CASES = (
    *(_case(layout, TILES[0]) for layout in LAYOUTS),
    *(_case("y = x W^T", tile, targets=("sm_121a",)) for tile in TILES[1:]),
    *(_case(layout, TILES[0], ragged=True, targets=("sm_121a",)) for layout in LAYOUTS),
    _case("y = x W^T", TILES[0], "fp16", expected=Expected(255, narrow_accesses=0)),
    *(_case(layout, FP32_TILE, "fp32", expected=Expected(255), targets=("sm_121a",)) for layout in LAYOUTS),
)
