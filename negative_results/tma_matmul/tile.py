"""What the kernel can be launched with, and on what. Nothing here imports triton."""

from __future__ import annotations

from torch import Tensor

from negative_results.sm121a_matmul.tile import Tile

# What the tuner chooses from. With bf16 each fits the 101,376 bytes of shared memory that a block has on GB10 and spills
# nowhere. Beside the buffers of the loads there is one for the block of C on its way out, 32 KB for 128 x 128, which is why
# none is larger. Specialised tiles fill as many buffers as there are stages, the others on mma.sync one less.
TILES = (
    Tile(128, 128, 64, warps=8, stages=3),
    Tile(128, 128, 64, warps=4, stages=3),
    Tile(128, 128, 32, warps=4, stages=5),
    Tile(128, 64, 64, warps=4, stages=4),
    Tile(128, 128, 64, warps=8, stages=2, specialised=True),
    Tile(128, 128, 64, warps=4, stages=2, specialised=True),
    Tile(128, 128, 32, warps=4, stages=4, specialised=True),
    Tile(128, 64, 64, warps=4, stages=3, specialised=True),
)

ALIGNMENT = 16  # bytes: what TMA asks of a matrix's first element and of the distance between its rows


def takes(a: Tensor, b: Tensor) -> bool:
    """Whether TMA can read a [M, K] and b [K, N], as they are or transposed, and write a b."""
    return _describable(a) and _describable(b) and b.shape[1] * b.element_size() % ALIGNMENT == 0


def _describable(matrix: Tensor) -> bool:
    """Whether memory holds it or its transpose as rows that follow one another at aligned distances. Where it begins is
    asked at the launch: a traced tensor has no address."""
    turned = matrix.stride(1) != 1
    width, row = matrix.shape[0 if turned else 1], matrix.stride(1 if turned else 0)
    contiguous = matrix.stride(0 if turned else 1) == 1
    return contiguous and row >= width and row * matrix.element_size() % ALIGNMENT == 0


def begins_aligned(matrix: Tensor) -> bool:
    """Whether its first element lies where TMA can begin to read."""
    return matrix.data_ptr() % ALIGNMENT == 0
