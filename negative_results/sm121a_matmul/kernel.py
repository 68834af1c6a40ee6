"""C = A B in Triton for any strides: kernel, custom op, public function.

A linear layer's three products are all of this form. With x [T, in], W [out, in] and dy [T, out] in memory as they are,
y = x W^T reads a transposed B, dx = dy W two plain matrices, and dW = dy^T x a transposed A. Only the strides differ, and
they are handed to the kernel: nothing is copied.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import FP32_TILE, GROUP_M, TILES, Tile

INTERPRETED = triton.knobs.runtime.interpret
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def block_of(i_program, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of a program's block of C: GROUP rows of blocks, column by column, then the next GROUP rows."""
    blocks_m, blocks_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    i_group, i_inside = i_program // (GROUP * blocks_n), i_program % (GROUP * blocks_n)
    rows = tl.minimum(blocks_m - i_group * GROUP, GROUP)
    return i_group * GROUP + i_inside % rows, i_inside // rows


@triton.jit
def _matmul_kernel(
    p_a, p_b, p_c, M, N, K, a_m, a_k, b_k, b_n, c_m,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A [M, K] with strides a_m and a_k, B [K, N] with b_k and b_n, C [M, N] with c_m and 1. EVEN: BK divides K."""
    i_m, i_n = block_of(tl.program_id(0), M, N, BM, BN, GROUP)
    # int64: an activation may hold more than 2^31 elements
    o_m = (i_m * BM + tl.arange(0, BM)).to(tl.int64)
    o_n = (i_n * BN + tl.arange(0, BN)).to(tl.int64)
    o_k = tl.arange(0, BK).to(tl.int64)
    m_m, m_n = (o_m < M)[:, None], (o_n < N)[None, :]
    p_a_block = p_a + o_m[:, None] * a_m + o_k[None, :] * a_k
    p_b_block = p_b + o_k[:, None] * b_k + o_n[None, :] * b_n
    step = tl.full((), BK, tl.int64)
    b_c = tl.zeros((BM, BN), dtype=tl.float32)
    for done in range(0, K, BK):
        m_a = m_m if EVEN else m_m & (o_k < K - done)[None, :]
        m_b = m_n if EVEN else m_n & (o_k < K - done)[:, None]
        b_a = tl.load(p_a_block, mask=m_a, other=0.0)
        b_b = tl.load(p_b_block, mask=m_b, other=0.0)
        b_c = tl.dot(b_a, b_b, b_c, input_precision="ieee")
        p_a_block += step * a_k
        p_b_block += step * b_k
    tl.store(p_c + o_m[:, None] * c_m + o_n[None, :], b_c.to(p_c.dtype.element_ty), mask=m_m & m_n)


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes a GPU tensor's device the one that a launch goes to."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@torch.library.custom_op("isoloss::sm121a_matmul", mutates_args=())
def _matmul(a: Tensor, b: Tensor, tile: list[int]) -> Tensor:
    (M, K), N = a.shape, b.shape[1]
    c = torch.empty(M, N, dtype=a.dtype, device=a.device)
    BM, BN, BK, warps, stages = tile[:5]
    if c.numel():
        with on_device_of(a):
            _matmul_kernel[(triton.cdiv(M, BM) * triton.cdiv(N, BN),)](
                a, b, c, M, N, K, *a.stride(), *b.stride(), N,
                BM=BM, BN=BN, BK=BK, GROUP=GROUP_M, EVEN=K % BK == 0, num_warps=warps, num_stages=stages,
            )  # fmt: skip
    return c


@_matmul.register_fake
def _(a: Tensor, b: Tensor, tile: list[int]) -> Tensor:
    return torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)


def matmul(a: Tensor, b: Tensor, tile: Tile = TILES[0]) -> Tensor:
    """a b, contiguous [M, N], summed in fp32 in one fixed order and rounded once.

    a [M, K] and b [K, N]: any strides, one dtype (bfloat16, float16 or float32), one device (CUDA, or CPU in Triton's
    interpreter). fp32 is multiplied in full precision, on a GPU with `FP32_TILE`. It has no gradient of its own: a linear
    layer asks for the products of its backward itself (`dispatch.linear`). Raises ValueError for anything else.
    """
    refuse_other(a, b)
    return _matmul(a, b, list(fitting(tile, a.dtype)))


def fitting(tile: Tile, dtype: torch.dtype) -> Tile:
    """`tile`, or for fp32 on a GPU the one that its shared memory holds."""
    return FP32_TILE if dtype == torch.float32 and not INTERPRETED else tile


def refuse_other(a: Tensor, b: Tensor) -> None:
    """Raises ValueError for what is no pair of matrices of one supported dtype on one device."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or a.dtype != b.dtype or a.device != b.device:
        sides = " and ".join(f"{list(side.shape)} {side.dtype} on {side.device}" for side in (a, b))
        raise ValueError(f"matmul: [M, K] and [K, N] of one dtype and device are expected, not {sides}")
    if a.dtype not in DTYPES:
        raise ValueError(f"matmul: dtype {a.dtype} is not one of {', '.join(map(str, DTYPES))}")
