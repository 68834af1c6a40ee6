"""What a matmul kernel can be launched with. Nothing here imports triton."""

from __future__ import annotations

from typing import NamedTuple

GROUP_M = 8  # rows of blocks that programs finish before they go on: what they read of A and B then stays in 24 MB of L2


class Tile(NamedTuple):
    """The block of C that a program computes, BM x BN, in steps of BK along the sum; warps a program, stages of loads.

    specialised: loads and products are issued by warps of their own, where the target has that (`tma_matmul` alone).
    """

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    specialised: bool = False

    def __str__(self) -> str:
        tail = ", specialised" if self.specialised else ""
        return f"{self.BM} x {self.BN} x {self.BK}, {self.warps} warps, {self.stages} stages{tail}"


# What the tuner chooses from. With bf16 each fits the 101,376 bytes of shared memory that a block has on GB10 (where
# mma.sync takes one buffer less than there are stages), and none spills: `cross_compile.py` asks for both. The fourth takes
# 48 KB, so that two programs share an SM.
TILES = (
    Tile(128, 128, 64, warps=8, stages=4),
    Tile(128, 128, 64, warps=8, stages=3),
    Tile(128, 128, 32, warps=4, stages=5),
    Tile(128, 128, 32, warps=4, stages=4),
    Tile(128, 256, 32, warps=8, stages=5),
    Tile(256, 128, 32, warps=8, stages=5),
    Tile(128, 64, 64, warps=4, stages=4),
    Tile(64, 128, 32, warps=4, stages=5),
    Tile(64, 64, 64, warps=4, stages=4),
)
FP32_TILE = Tile(32, 32, 32, warps=4, stages=2)  # fp32 is for gates: no tensor core multiplies it in full precision
