"""silu(x G^T) * (x U^T) in one Triton kernel: a tile of y has an accumulator for each of the two products.

Forward writes y and, for backward, gate = x G^T and up = x U^T, rounded; y comes from the accumulators and is rounded once.
Backward is silu_mul's kernel for d gate and d up, then products of the library.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.silu_mul.kernel import DTYPES, INTERPRETED, _sigmoid_and_silu
from kernels.silu_mul.kernel import _backward as silu_mul_backward
from negative_results.sm121a_matmul.kernel import block_of

# Two fp32 accumulators of 128 x 64 take what one of 128 x 128 takes; two of those spill registers on every kind of GPU.
# Three stages of a tile of x and two of weights are 96 KiB of shared memory in bf16, which a block just has on sm_120.
TILES = {"BT": 128, "BI": 64, "BD": 64, "GROUP": 8}
WARPS, STAGES = 8, 3
TILES_FP32 = {"BT": 64, "BI": 64, "BD": 32, "GROUP": 8}
TILES_INTERPRETED = {"BT": 1024, "BI": 512, "BD": 1024, "GROUP": 8}  # the interpreter's cost is per step of a program


@triton.jit
def _forward_kernel(
    p_x, p_gate_weight, p_up_weight, p_y, p_gate, p_up, T, I, D,
    KEEP: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # programs of GROUP rows of tiles run after one another, so that what they share is still in L2
    i_t, i_i = block_of(tl.program_id(0), T, I, BT, BI, GROUP)
    o_t = i_t.to(tl.int64) * BT + tl.arange(0, BT)  # int64: an activation may hold more than 2^31 elements
    o_i = i_i.to(tl.int64) * BI + tl.arange(0, BI)
    o_d = tl.arange(0, BD)
    m_t, m_i = o_t < T, o_i < I
    p_x_tile = p_x + o_t[:, None] * D + o_d[None, :]  # [BT, BD]
    o_weight = o_i[None, :] * D + o_d[:, None]  # [BD, BI]
    b_gate = tl.zeros((BT, BI), tl.float32)
    b_up = tl.zeros((BT, BI), tl.float32)
    for start in range(0, D, BD):
        m_d = o_d < D - start
        b_x = tl.load(p_x_tile + start, mask=m_t[:, None] & m_d[None, :], other=0.0)
        m_weight = m_d[:, None] & m_i[None, :]
        b_gate_weight = tl.load(p_gate_weight + o_weight + start, mask=m_weight, other=0.0)
        b_gate = tl.dot(b_x, b_gate_weight, b_gate, input_precision="ieee")
        b_up_weight = tl.load(p_up_weight + o_weight + start, mask=m_weight, other=0.0)
        b_up = tl.dot(b_x, b_up_weight, b_up, input_precision="ieee")
    o_y, m_y = o_t[:, None] * I + o_i[None, :], m_t[:, None] & m_i[None, :]
    _, b_silu = _sigmoid_and_silu(b_gate, p_x.dtype.element_ty == tl.float32)
    tl.store(p_y + o_y, (b_silu * b_up).to(p_y.dtype.element_ty), mask=m_y)
    if KEEP:
        tl.store(p_gate + o_y, b_gate.to(p_gate.dtype.element_ty), mask=m_y)
        tl.store(p_up + o_y, b_up.to(p_up.dtype.element_ty), mask=m_y)


def tiling(dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes of a launch: in fp32 there are no tensor cores to feed, and smaller tiles."""
    if INTERPRETED.value:
        return TILES_INTERPRETED
    return TILES_FP32 if dtype == torch.float32 else TILES


@torch.library.custom_op("isoloss::fused_swiglu_matmul", mutates_args=())
def _forward(x: Tensor, gate_weight: Tensor, up_weight: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y, and gate and up [T, I], or of no elements unless they are to be kept."""
    (T, D), I = x.shape, len(gate_weight)
    y = torch.empty(T, I, dtype=x.dtype, device=x.device)
    gate, up = (torch.empty((T, I) if keep else (0, I), dtype=x.dtype, device=x.device) for _ in range(2))
    tiles = tiling(x.dtype)
    grid = (triton.cdiv(T, tiles["BT"]) * triton.cdiv(I, tiles["BI"]),)
    device = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
    if y.numel():
        with device:
            _forward_kernel[grid](
                x.contiguous(), gate_weight.contiguous(), up_weight.contiguous(), y, gate, up, T, I, D,
                KEEP=keep, **tiles, num_warps=WARPS, num_stages=STAGES,
            )  # fmt: skip
    return y, gate, up


@_forward.register_fake
def _(x: Tensor, gate_weight: Tensor, up_weight: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    T, I = len(x), len(gate_weight)
    rows = (T, T, T) if keep else (T, 0, 0)
    y, gate, up = (torch.empty(size, I, dtype=x.dtype, device=x.device) for size in rows)
    return y, gate, up


def _save(ctx, inputs: tuple[Tensor, Tensor, Tensor, bool], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output[1:])


def _differentiate(ctx, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    x, gate_weight, up_weight, gate, up = ctx.saved_tensors
    d_gate, d_up = silu_mul_backward(dy, gate, up)
    needs_x, needs_gate, needs_up, _ = ctx.needs_input_grad
    dx = torch.addmm(d_gate @ gate_weight, d_up, up_weight) if needs_x else None
    return dx, d_gate.t() @ x if needs_gate else None, d_up.t() @ x if needs_up else None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def fused_swiglu(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    """silu(x gate_weight^T) * (x up_weight^T), [..., I], rounded once.

    x [..., D]; gate_weight and up_weight [I, D]; one dtype (bfloat16, float16 or float32), one device (CUDA, or CPU in
    Triton's interpreter), any strides. Sums are in fp32. Differentiable once in all three. Raises ValueError otherwise.
    """
    sides = (x, gate_weight, up_weight)
    if gate_weight.ndim != 2 or gate_weight.shape != up_weight.shape or x.ndim < 1 or x.shape[-1] != gate_weight.shape[1]:
        shapes = ", ".join(str(list(side.shape)) for side in sides)
        raise ValueError(f"fused_swiglu: x [..., D] and two weights [I, D] are expected, not {shapes}")
    if len({(side.dtype, side.device) for side in sides}) > 1 or x.dtype not in DTYPES:
        words = ", ".join(f"{side.dtype} on {side.device}" for side in sides)
        raise ValueError(f"fused_swiglu: one device and one of {', '.join(map(str, DTYPES))} are expected, not {words}")
    keep = torch.is_grad_enabled() and any(side.requires_grad for side in sides)
    y, _, _ = _forward(x.reshape(-1, x.shape[-1]), gate_weight, up_weight, keep)
    return y.view(*x.shape[:-1], len(gate_weight))
