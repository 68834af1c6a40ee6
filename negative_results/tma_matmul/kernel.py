"""C = A B in Triton through tensor descriptors (TMA), by programs that stay for many blocks: kernel, custom op, function.

A descriptor describes a matrix as memory holds it, row by row. The products of a linear layer that read one transposed load
its blocks as they are and turn them in shared memory, where both matrix instructions take either order.
"""

from __future__ import annotations

import contextvars

import torch
import triton
import triton.language as tl
from torch import Tensor

from negative_results.sm121a_matmul.kernel import INTERPRETED, block_of, fitting, on_device_of, refuse_other
from negative_results.sm121a_matmul.tile import GROUP_M, Tile

from .tile import TILES, begins_aligned, takes

PROGRAMS_INTERPRETED = 3  # so that one computes several blocks


@triton.jit
def _matmul_kernel(
    p_a, p_b, p_c, M, N, K, a_row, b_row, c_row, programs,
    A_IS_KM: tl.constexpr, B_IS_NK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    SPECIALISED: tl.constexpr,
):  # fmt: skip
    """A is held as [M, K], or as [K, M] where A_IS_KM; B as [K, N], or as [N, K]; rows of stride a_row and so on."""
    if A_IS_KM:
        a = tl.make_tensor_descriptor(p_a, [K, M], [a_row, 1], [BK, BM])
    else:
        a = tl.make_tensor_descriptor(p_a, [M, K], [a_row, 1], [BM, BK])
    if B_IS_NK:
        b = tl.make_tensor_descriptor(p_b, [N, K], [b_row, 1], [BN, BK])
    else:
        b = tl.make_tensor_descriptor(p_b, [K, N], [b_row, 1], [BK, BN])
    c = tl.make_tensor_descriptor(p_c, [M, N], [c_row, 1], [BM, BN])
    blocks = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    # Hopper's specialisation takes no flattened loop; without it flattening lets the next block's loads begin early
    for i_block in tl.range(tl.program_id(0), blocks, programs, flatten=not SPECIALISED, warp_specialize=SPECIALISED):
        i_m, i_n = block_of(i_block, M, N, BM, BN, GROUP)
        o_m, o_n = i_m * BM, i_n * BN
        b_c = tl.zeros((BM, BN), dtype=tl.float32)
        for i_k in range(tl.cdiv(K, BK)):
            o_k = i_k * BK
            b_a = a.load([o_k, o_m]).T if A_IS_KM else a.load([o_m, o_k])
            b_b = b.load([o_n, o_k]).T if B_IS_NK else b.load([o_k, o_n])
            b_c = tl.dot(b_a, b_b, b_c, input_precision="ieee")
        c.store([o_m, o_n], b_c.to(p_c.dtype.element_ty))


@torch.library.custom_op("isoloss::tma_matmul", mutates_args=())
def _matmul(a: Tensor, b: Tensor, tile: list[int]) -> Tensor:
    if not a.shape[1] or not (begins_aligned(a) and begins_aligned(b)):
        return torch.mm(a, b)
    c = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
    if c.numel():
        with on_device_of(a):
            contextvars.copy_context().run(_launch, a, b, c, tile)
    return c


@_matmul.register_fake
def _(a: Tensor, b: Tensor, tile: list[int]) -> Tensor:
    return torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)


def _launch(a: Tensor, b: Tensor, c: Tensor, tile: list[int]) -> None:
    """Runs in a context of its own: the allocator is a context variable, which a thread of autograd's backward does not
    inherit, and which other code in this one may have set to its own."""
    triton.set_allocator(_workspace)
    (M, K), N = a.shape, b.shape[1]
    BM, BN, BK, warps, stages, specialised = tile
    turned_a, turned_b = a.stride(1) != 1, b.stride(1) != 1
    blocks = triton.cdiv(M, BM) * triton.cdiv(N, BN)
    programs = min(blocks, PROGRAMS_INTERPRETED if INTERPRETED else _processors(a.device))
    _matmul_kernel[(programs,)](
        a, b, c, M, N, K, a.stride(int(turned_a)), b.stride(int(turned_b)), N, programs,
        A_IS_KM=turned_a, B_IS_NK=turned_b, BM=BM, BN=BN, BK=BK, GROUP=GROUP_M, SPECIALISED=bool(specialised),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where the programs write their descriptors. PyTorch's blocks are aligned to more than the 128 bytes asked for."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def matmul(a: Tensor, b: Tensor, tile: Tile = TILES[0]) -> Tensor:
    """a b, contiguous [M, N], summed in fp32 in one fixed order and rounded once.

    a [M, K] and b [K, N] of one dtype (bfloat16, float16 or float32) on one device (CUDA, or CPU in Triton's interpreter):
    each of them or its transpose has contiguous rows, and every row, those of the result included, lies at a multiple of 16
    bytes from the first. fp32 is multiplied in full precision, on a GPU with `FP32_TILE`. A matrix whose first element lies
    where TMA can't begin is left to torch.mm. It has no gradient of its own: a linear layer asks for the products of its
    backward itself. Raises ValueError for anything else.
    """
    refuse_other(a, b)
    if not takes(a, b):
        sides = " and ".join(f"{list(side.shape)} with strides {side.stride()}" for side in (a, b))
        raise ValueError(f"matmul: TMA needs contiguous rows at multiples of 16 bytes, not {sides}")
    return _matmul(a, b, list(fitting(tile, a.dtype)))
