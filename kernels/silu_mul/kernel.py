"""silu(gate) * up in Triton: kernel, custom op, autograd, public function.

With s = sigmoid(gate):  y = gate s up,  dgate = dy up s (1 + gate (1 - s)),  dup = dy gate s.
Backward recomputes s: gate and up are saved anyway, and reading a saved activation costs more than an exponential.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
BLOCK = 1024  # elements of a program, 4 warps x 8 a thread: one 16-byte load of bf16
BLOCK_INTERPRETED = 1 << 18  # the interpreter's cost is per program, not per element
WARPS = 4
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _accurate_exp(b_x):
    """The interpreter has no libdevice; its tl.exp is NumPy's, accurate already."""
    return tl.exp(b_x) if INTERPRETED else libdevice.exp(b_x)


@triton.jit
def _sigmoid_and_silu(b_gate, PRECISE: tl.constexpr):
    """fp32 in and out. PRECISE: full-precision exp and divide, whose last bits only an fp32 result can show."""
    if PRECISE:
        b_denominator = 1.0 + _accurate_exp(-b_gate)
        b_sigmoid = tl.div_rn(1.0, b_denominator)
        b_silu = tl.div_rn(b_gate, b_denominator)
    else:
        b_sigmoid = 1.0 / (1.0 + tl.exp(-b_gate))
        b_silu = b_gate * b_sigmoid
    return b_sigmoid, b_silu


@triton.jit
def _tile(T, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [ROWS, 1], columns [1, BLOCK] of a program, and which of its elements there are."""
    columns = tl.cdiv(N, BLOCK)
    # int64: an activation may hold more than 2^31 elements
    o_t = (tl.program_id(0) // columns).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_n = (tl.program_id(0) % columns) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return o_t, o_n, (o_t < T) & (o_n < N)


@triton.jit
def _forward_kernel(p_gate, p_up, p_y, T, N, gate_stride, up_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    o_t, o_n, m_tile = _tile(T, N, ROWS, BLOCK)
    b_gate = tl.load(p_gate + o_t * gate_stride + o_n, mask=m_tile, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + o_t * up_stride + o_n, mask=m_tile, other=0.0).to(tl.float32)
    _, b_silu = _sigmoid_and_silu(b_gate, p_gate.dtype.element_ty == tl.float32)
    tl.store(p_y + o_t * N + o_n, (b_silu * b_up).to(p_y.dtype.element_ty), mask=m_tile)


@triton.jit
def _backward_kernel(
    p_dy, p_gate, p_up, p_dboth, T, N, dy_stride, gate_stride, up_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    o_t, o_n, m_tile = _tile(T, N, ROWS, BLOCK)
    b_dy = tl.load(p_dy + o_t * dy_stride + o_n, mask=m_tile, other=0.0).to(tl.float32)
    b_gate = tl.load(p_gate + o_t * gate_stride + o_n, mask=m_tile, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + o_t * up_stride + o_n, mask=m_tile, other=0.0).to(tl.float32)
    b_sigmoid, b_silu = _sigmoid_and_silu(b_gate, p_gate.dtype.element_ty == tl.float32)
    b_dgate = b_dy * b_up * b_sigmoid * (1.0 + b_gate * (1.0 - b_sigmoid))
    p_dgate = p_dboth + o_t * (2 * N) + o_n
    tl.store(p_dgate, b_dgate.to(p_dboth.dtype.element_ty), mask=m_tile)
    tl.store(p_dgate + N, (b_dy * b_silu).to(p_dboth.dtype.element_ty), mask=m_tile)


def tiling(T: int, N: int) -> dict[str, int]:
    """A program's share of T rows of N: a part of one row, or several short ones."""
    elements = BLOCK_INTERPRETED if INTERPRETED.value else BLOCK
    block = min(triton.next_power_of_2(N), elements)
    return {"ROWS": min(elements // block, triton.next_power_of_2(T)), "BLOCK": block}


def _rows(x: Tensor) -> Tensor:
    """x [..., N] as [T, N] whose columns lie side by side: a view wherever the strides allow one."""
    rows = x.reshape(-1, x.shape[-1] if x.ndim else 1)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def launch(kernel: triton.JITFunction, result: Tensor, *sides: Tensor, warps: int = WARPS) -> None:
    """Runs an elementwise kernel over tensors of one shape, into a contiguous result, on the device that they are on."""
    if result.numel() == 0:
        return
    rows = [_rows(side) for side in sides]
    T, N = rows[0].shape
    tile = tiling(T, N)
    programs = triton.cdiv(T, tile["ROWS"]) * triton.cdiv(N, tile["BLOCK"])
    device = torch.cuda.device(result.device) if result.is_cuda else contextlib.nullcontext()
    with device:
        kernel[(programs,)](*rows, result, T, N, *(side.stride(0) for side in rows), **tile, num_warps=warps)


@torch.library.custom_op("isoloss::silu_mul", mutates_args=())
def _forward(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    launch(_forward_kernel, y, gate, up)
    return y


@_forward.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


def both(x: Tensor) -> Tensor:
    """[..., 2 N] for x [..., N]; [2] for a scalar."""
    return torch.empty((*x.shape[:-1], 2 * (x.shape[-1] if x.ndim else 1)), dtype=x.dtype, device=x.device)


@torch.library.custom_op("isoloss::silu_mul_backward", mutates_args=())
def _backward(dy: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """dgate and dup side by side, [..., 2 N]: a product that wants both, as that for dx of an MLP, finds them in one."""
    dboth = both(gate)
    launch(_backward_kernel, dboth, dy, gate, up)
    return dboth


@_backward.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return both(gate)


def _save_inputs(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = _backward(dy, *ctx.saved_tensors).chunk(2, dim=-1)
    return dgate.view(dy.shape), dup.view(dy.shape)


_forward.register_autograd(_differentiate, setup_context=_save_inputs)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, with fp32 arithmetic inside and one rounding at the end.

    gate, up: one shape [...], one dtype (bfloat16, float16 or float32), one device (CUDA, or CPU in Triton's interpreter);
    any strides, the result is contiguous. Differentiable once in both; the gradients are views
    of one tensor, the gate's before the other's in every row. Raises ValueError for anything else.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        sides = " and ".join(f"{list(side.shape)} {side.dtype} on {side.device}" for side in (gate, up))
        raise ValueError(f"silu_mul: gate and up must agree in shape, dtype and device, not {sides}")
    if gate.dtype not in DTYPES:
        raise ValueError(f"silu_mul: dtype {gate.dtype} is not one of {', '.join(map(str, DTYPES))}")
    return _forward(gate, up)
