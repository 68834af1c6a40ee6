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
BLOCK = 1024  # 4 warps x 8 elements a thread: one 16-byte load of bf16
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
def _forward_kernel(p_gate, p_up, p_y, size, BLOCK: tl.constexpr):
    # int64: an activation may hold more than 2^31 elements
    o_block = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_block = o_block < size
    b_gate = tl.load(p_gate + o_block, mask=m_block, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + o_block, mask=m_block, other=0.0).to(tl.float32)
    _, b_silu = _sigmoid_and_silu(b_gate, p_gate.dtype.element_ty == tl.float32)
    tl.store(p_y + o_block, (b_silu * b_up).to(p_y.dtype.element_ty), mask=m_block)


@triton.jit
def _backward_kernel(p_dy, p_gate, p_up, p_dgate, p_dup, size, BLOCK: tl.constexpr):
    o_block = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_block = o_block < size
    b_dy = tl.load(p_dy + o_block, mask=m_block, other=0.0).to(tl.float32)
    b_gate = tl.load(p_gate + o_block, mask=m_block, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + o_block, mask=m_block, other=0.0).to(tl.float32)
    b_sigmoid, b_silu = _sigmoid_and_silu(b_gate, p_gate.dtype.element_ty == tl.float32)
    b_dgate = b_dy * b_up * b_sigmoid * (1.0 + b_gate * (1.0 - b_sigmoid))
    tl.store(p_dgate + o_block, b_dgate.to(p_dgate.dtype.element_ty), mask=m_block)
    tl.store(p_dup + o_block, (b_dy * b_silu).to(p_dup.dtype.element_ty), mask=m_block)


def _launch(kernel: triton.JITFunction, *tensors: Tensor) -> None:
    """Runs an elementwise kernel over contiguous tensors of one size, on the device that they are on."""
    size = tensors[0].numel()
    if size == 0:
        return
    block = min(triton.next_power_of_2(size), BLOCK_INTERPRETED) if INTERPRETED.value else BLOCK
    device = torch.cuda.device(tensors[0].device) if tensors[0].is_cuda else contextlib.nullcontext()
    with device:
        kernel[(triton.cdiv(size, block),)](*tensors, size, BLOCK=block, num_warps=WARPS)


@torch.library.custom_op("isoloss::silu_mul", mutates_args=())
def _forward(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _launch(_forward_kernel, gate.contiguous(), up.contiguous(), y)
    return y


@_forward.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@torch.library.custom_op("isoloss::silu_mul_backward", mutates_args=())
def _backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    _launch(_backward_kernel, dy.contiguous(), gate.contiguous(), up.contiguous(), dgate, dup)
    return dgate, dup


@_backward.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(gate.shape, dtype=gate.dtype, device=gate.device),
        torch.empty(up.shape, dtype=up.dtype, device=up.device),
    )


def _save_inputs(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
    return _backward(dy, *ctx.saved_tensors)


_forward.register_autograd(_differentiate, setup_context=_save_inputs)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, with fp32 arithmetic inside and one rounding at the end.

    gate, up: one shape [...], one dtype (bfloat16, float16 or float32), one device (CUDA, or CPU in Triton's interpreter);
    any strides, the result is contiguous. Differentiable once in both. Raises ValueError for anything else.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        sides = " and ".join(f"{list(side.shape)} {side.dtype} on {side.device}" for side in (gate, up))
        raise ValueError(f"silu_mul: gate and up must agree in shape, dtype and device, not {sides}")
    if gate.dtype not in DTYPES:
        raise ValueError(f"silu_mul: dtype {gate.dtype} is not one of {', '.join(map(str, DTYPES))}")
    return _forward(gate, up)
