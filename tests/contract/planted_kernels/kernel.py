"""Kernels with the instructions and the mistakes that test_cross_compile looks for. They are only ever compiled."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _twice(b_x):
    return b_x + b_x


@triton.jit
def _copy_kernel(p_x, p_y, size, BLOCK: tl.constexpr):
    o_block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_block = o_block < size
    tl.store(p_y + o_block, _twice(tl.load(p_x + o_block, mask=m_block)), mask=m_block)


@triton.jit
def _product_kernel(p_a, p_b, p_c, BLOCK: tl.constexpr):
    o_side = tl.arange(0, BLOCK)
    o_tile = o_side[:, None] * BLOCK + o_side[None, :]
    tl.store(p_c + o_tile, tl.dot(tl.load(p_a + o_tile), tl.load(p_b + o_tile)))


@triton.jit
def _descriptor_kernel(p_x, p_y, rows, BLOCK: tl.constexpr):
    x = tl.make_tensor_descriptor(p_x, shape=[rows, BLOCK], strides=[BLOCK, 1], block_shape=[BLOCK, BLOCK])
    y = tl.make_tensor_descriptor(p_y, shape=[rows, BLOCK], strides=[BLOCK, 1], block_shape=[BLOCK, BLOCK])
    y.store([0, 0], x.load([0, 0]))


@triton.autotune(configs=[triton.Config({})], key=[])
@triton.jit
def _spilling_kernel(p_x, p_y, BLOCK: tl.constexpr):
    """Every value is needed twice, with a sum of all between."""
    o_block = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_block)
    tl.store(p_y + o_block, b_x * tl.sum(b_x))


@triton.jit
def _refused_kernel(p_x, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK > 1024, "a block is too small")
    tl.store(p_x, BLOCK)


@triton.jit
def _deadly_kernel(p_x, MODE: tl.constexpr):
    tl.store(p_x, 1)


@triton.jit()
def _forgotten_kernel(p_x):
    tl.store(p_x, 1)
