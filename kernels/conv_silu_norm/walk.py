"""What the forward and the backward kernel share: a walk down the rows of a few heads, UNROLL rows a step.

The rows of a step and the three above them are a tuple of blocks [BH, BD] in registers. So a row is read once and not copied
as it moves up, a step's loads are in flight together, and where no document begins in a step, which is the rule, nothing is
masked. A warp has whole heads, so that no sum crosses warps. Which place in a step a row has depends on where its program
begins; therefore products and sums are fused by name: left to the compiler, a row's bits could differ from place to place.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Both bf16 of a register at once, where a cast first takes a half out.
WIDEN_PAIR = tl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;")
# 1 / (1 + 2^(-x log2 e)): two special functions and two other instructions; expf and a division are five of those.
SIGMOID = tl.constexpr("""{ .reg .f32 t;
mul.rn.f32 t, $1, 0fBFB8AA3B;
ex2.approx.ftz.f32 t, t;
add.rn.f32 t, t, 0f3F800000;
rcp.approx.ftz.f32 $0, t; }""")


@triton.jit
def widened(rows):
    """A tuple of rows in fp32."""
    wide = ()
    for u in tl.static_range(len(rows)):
        if rows[u].dtype == tl.bfloat16 and not INTERPRETED:
            wide += (tl.inline_asm_elementwise(WIDEN_PAIR, "=r,=r,r", [rows[u]], tl.float32, is_pure=True, pack=2),)
        else:
            wide += (rows[u].to(tl.float32),)
    return wide


@triton.jit
def sigmoid_and_silu(b_x, WIDE: tl.constexpr):
    """fp32 in and out. With the full-precision exponential and division for fp32 tensors, whose last bits show them."""
    if INTERPRETED:  # has neither libdevice nor PTX; NumPy's functions are accurate already
        b_denominator = 1.0 + tl.exp(-b_x)
        b_sigmoid, b_silu = 1.0 / b_denominator, b_x / b_denominator
    elif WIDE.is_fp64():
        b_denominator = 1.0 + libdevice.exp(-b_x)
        b_sigmoid, b_silu = tl.div_rn(1.0, b_denominator), tl.div_rn(b_x, b_denominator)
    else:
        b_sigmoid = tl.inline_asm_elementwise(SIGMOID, "=r,r", [b_x], tl.float32, is_pure=True, pack=1)
        b_silu = b_x * b_sigmoid
    return b_sigmoid, b_silu


@triton.jit
def sums_over_columns(b_a, b_b, WIDE: tl.constexpr):
    """Sums of a b [BH, 1], wide. Products are rounded before they are added: where a lane has one alone, fusing it with the
    addition of its neighbour's would leave lanes with different sums of a row, which all of them write to one place."""
    b_a, b_b = b_a.to(WIDE), b_b.to(WIDE)
    b_products = b_a * b_b if INTERPRETED else libdevice.mul_rn(b_a, b_b)
    return tl.sum(b_products, axis=1, keep_dims=True)


@triton.jit
def four_taps(b_w, b_3, b_2, b_1, b_0, WIDE: tl.constexpr):
    """w[0] b_3 + w[1] b_2 + w[2] b_1 + w[3] b_0 in fp32, where b_j is j rows away."""
    b_sum = b_w[0].to(WIDE) * b_3.to(WIDE)
    b_sum = tl.fma(b_w[1].to(WIDE), b_2.to(WIDE), b_sum)
    b_sum = tl.fma(b_w[2].to(WIDE), b_1.to(WIDE), b_sum)
    return tl.fma(b_w[3].to(WIDE), b_0.to(WIDE), b_sum).to(tl.float32)


@triton.jit
def convolved(b_w, x, starts, row, u: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr):
    """p of row + u, fp32, where x holds rows from row - 3 on and starts those from row on. MASKED: without rows above its
    document; otherwise there are none, and no starts."""
    b_3, b_2, b_1 = x[u], x[u + 1], x[u + 2]
    if MASKED:
        above = row + u - starts[u]  # so many rows of the document are
        b_3, b_2, b_1 = tl.where(above >= 3, b_3, 0.0), tl.where(above >= 2, b_2, 0.0), tl.where(above >= 1, b_1, 0.0)
    return four_taps(b_w, b_3, b_2, b_1, x[u + 3], WIDE)


@triton.jit
def load_rows(p_rows, stride: tl.constexpr, m_c, row, T, COUNT: tl.constexpr):
    """A tuple of COUNT rows from `row` on, which p_rows points to; zeros from row T on."""
    loaded = ()
    for u in tl.static_range(COUNT):
        loaded += (tl.load(p_rows + u * stride, mask=m_c & (row + u < T), other=0.0),)
    return loaded


@triton.jit
def load_starts(p_starts, row, T, COUNT: tl.constexpr):
    """Where the documents of COUNT rows begin; T from row T on."""
    loaded = ()
    for u in tl.static_range(COUNT):
        loaded += (tl.load(p_starts + (row + u), mask=row + u < T, other=T),)
    return loaded


@triton.jit
def begins_below(start, row, CHUNKS: tl.constexpr):
    """Whether a document that begins at `start` begins below `row`; any of them, where there are several."""
    return start > row if CHUNKS == 1 else tl.max(start - row) > 0


@triton.jit
def chunk_of_rows(rows, GROUPS: tl.constexpr, CHUNKS: tl.constexpr, BH: tl.constexpr):
    """A program's chunk of rows and its first row. With CHUNKS > 1 it walks down as many side by side, which spares the
    interpreter programs: both are then [CHUNKS BH, 1] where otherwise they are numbers, and blocks [CHUNKS BH, BD]."""
    i_chunk = tl.program_id(0) // GROUPS
    if CHUNKS > 1:
        i_chunk = i_chunk * CHUNKS + tl.arange(0, CHUNKS * BH)[:, None] // BH
    return i_chunk, i_chunk * rows


@triton.jit
def group_of_heads(i_group, p_q, p_k, HK: tl.constexpr, K: tl.constexpr, GROUPS_QK: tl.constexpr, BH: tl.constexpr):
    """Of a group of BH heads of q or of k: its tensor, its first head, and the tensor's first column in the projection."""
    if i_group < GROUPS_QK:
        p_part, i_head, o_part = p_q, i_group * BH, 0
    else:
        p_part, i_head, o_part = p_k, HK + (i_group - GROUPS_QK) * BH, HK * K
    return p_part, i_head, o_part


@triton.jit
def columns_of(p_weight, i_head, end, K: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, CHUNKS: tl.constexpr):
    """BH heads from i_head on [BH, 1], which of them begin before column `end`, their columns [BH, BD], which of these are
    before it, and the weights of their four taps, fp32."""
    o_h, o_d = i_head + tl.arange(0, CHUNKS * BH)[:, None] % BH, tl.arange(0, BD)[None, :]
    o_c = o_h * K + o_d
    m_c = (o_d < K) & (o_c < end)
    b_w = ()
    for tap in tl.static_range(4):
        b_w += (tl.load(p_weight + o_c * 4 + tap, mask=m_c, other=0.0).to(tl.float32),)
    return o_h, o_h * K < end, o_c, m_c, b_w
