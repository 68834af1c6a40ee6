"""Blocks, warps and stages of every kernel, by GPU and head width: a fixed table, since bits must not depend on a timing."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """BM queries by BN keys. A program has BM queries forward and in dq, BN keys in dk and dv, and walks over the others."""

    BM: int
    BN: int
    warps: int
    stages: int  # blocks on their way at once, through shared memory


@dataclass(frozen=True)
class Plan:
    """One tile a kernel. dkdv: one pass for both gradients, or a pass for each: twice as many sums in registers are then as
    many rows, for one product more. heads: of a group of query heads that share a key, how many a program of dk and dv takes
    one after another, where these are a divisor of the group; 0 for all. What is left is added up by a kernel of its own."""

    forward: Tile
    dq: Tile
    dkdv: dict[str, Tile]  # "dk", "dv", or "dkdv" for both
    heads: int = 1

    def heads_of(self, group: int) -> int:
        return math.gcd(group, self.heads)


# By head width, padded. wgmma gives each group of four warps 64 rows. The widest heads have one group forward and in dq, and
# few keys at a time: forward two programs then share a multiprocessor. In dk and dv they have two groups, which share out
# the columns of both sums and each compute all scores of 64 keys. Both were faster on an H200 than blocks of 128 and a pass
# for each gradient, though dq and dk and dv spill. Narrower heads' tiles are estimates.
HOPPER = {
    256: Plan(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), {"dkdv": Tile(64, 64, 8, 2)}),
    128: Plan(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), {"dkdv": Tile(64, 128, 8, 2)}),
    64: Plan(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), {"dkdv": Tile(64, 128, 8, 2)}),
}
# mma.sync, within the 99 KiB of shared memory that a block has on consumer GPUs and DGX Spark.
OTHERS = {
    256: Plan(Tile(32, 64, 4, 2), Tile(32, 32, 4, 2), {"dk": Tile(32, 32, 4, 2), "dv": Tile(32, 64, 4, 2)}),
    128: Plan(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), {"dkdv": Tile(32, 64, 4, 2)}),
    64: Plan(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), {"dkdv": Tile(32, 64, 4, 2)}),
}
NARROWEST, WIDEST = 16, 256  # columns that tensor cores take at least, and that a program's sums have room for
INTERPRETED = Plan(Tile(64, 64, 1, 1), Tile(64, 64, 1, 1), {"dkdv": Tile(64, 64, 1, 1)})


def padded(D: int) -> int:
    """The columns of a block for heads of D."""
    return max(NARROWEST, 1 << (D - 1).bit_length())


def plan_for(capability: tuple[int, int], D: int) -> Plan:
    """What a GPU of this compute capability runs for heads of D."""
    return (HOPPER if capability[0] == 9 else OTHERS)[max(padded(D), 64)]
