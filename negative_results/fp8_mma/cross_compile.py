"""The quantisation for a launch on contiguous rows, and the product as nvcc builds it. Without an e4m3 product: sm_80."""

from __future__ import annotations

from kernels.cross_compile import CompileCase, CudaCase, Expected, Instruction

from . import quantise
from .mma import FLAGS, SOURCE, STAGES, TILE_K, TILE_M, TILE_N

HOPPER, BLACKWELL = ("sm_90a",), ("sm_120a", "sm_121a")
STEPS = TILE_K // 32 * 4 * 4  # products that a warp makes of one stage: 64 x 32 outputs, 16 x 8 each
INSTRUCTIONS = (
    Instruction("kind::f8f6f4", r"^mma\.sync\S*kind::f8f6f4\S*\.e4m3\.e4m3", BLACKWELL, least=STEPS),
    Instruction("QMMA e4m3", r"\bQMMA\.16832\.F32\.E4M3\.E4M3", BLACKWELL, "sass", STEPS),
    Instruction("HMMA", r"\bHMMA\.16816\.F32", HOPPER, "sass", 2 * STEPS),  # e4m3 widened to fp16, in two halves
    Instruction("QMMA e4m3", r"\bQMMA", HOPPER, "sass", least=0, most=0),
    Instruction("ldmatrix", r"\bLDSM\.16\.M88\.4", HOPPER + BLACKWELL, "sass", TILE_K // 32 * 6),
    Instruction("cp.async", r"^cp\.async\.cg\.shared\.global .* 16,", HOPPER + BLACKWELL, least=4),
)
RING = STAGES * (TILE_M + TILE_N) * TILE_K
# Blackwell: two blocks of 8 warps on an SM. On Hopper this kernel is there to be checked, not to be fast.
REGISTERS = {BLACKWELL: 128, HOPPER: 255}


def _products(out: str, mangled: str) -> list[CudaCase]:
    return [
        CudaCase(
            name=f"product, {out}, {'Hopper' if targets is HOPPER else 'Blackwell'}",
            source=SOURCE,
            kernel=f"product_kernelI{mangled}E",
            expected=Expected(registers=registers, shared_bytes=RING, instructions=INSTRUCTIONS),
            flags=FLAGS,
            targets=targets,
        )
        for targets, registers in REGISTERS.items()
    ]


def _quantisations(width: int) -> list[CompileCase]:
    return [
        CompileCase(
            name=f"quantisation, {dtype}, {width} wide",
            kernel=quantise._quantise_kernel,
            signature={"p_x": f"*{dtype}", "p_codes": "*u8", "p_scales": "*fp32", "K": "i32"},
            expected=Expected(registers=64, shared_bytes=64),  # 8 blocks of 4 warps on an SM; shared: the maximum of 4 warps
            constexprs={"BLOCK": quantise.block_for(width)},
            multiples_of_16=("K",),
            options={"num_warps": quantise.WARPS},
        )
        for dtype in ("bf16", "fp32")
    ]


CASES = (*_products("bf16", "13__nv_bfloat16"), *_products("fp32", "f"), *_quantisations(2048))
