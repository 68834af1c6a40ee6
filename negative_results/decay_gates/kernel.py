"""beta = sigmoid(b) and g = -exp(A) softplus(a + dt) in Triton: kernels, custom ops, autograd, public function.

With z = a + dt and s = exp(z) / (1 + exp(z)):  da = -dg exp(A) s,  db = dbeta beta (1 - beta),
dA = sum over positions of dg g,  d dt = sum over positions of da before it is rounded.
softplus(z) is z above 20, and s then 1, as in PyTorch. Everything is in fp32 with full-precision functions: there are a few
numbers a position, and launches are what the time goes to.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LINEAR = tl.constexpr(20.0)  # PyTorch's threshold
BLOCK = 512
BLOCK_INTERPRETED = 1 << 16  # the interpreter's cost is per program, not per element
WARPS = 4
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _exp(b_x):
    """The interpreter has no libdevice, and NumPy's exp of fp32 is off by up to 2.5 units in the last place: fp64 there."""
    return tl.exp(b_x.to(tl.float64)).to(tl.float32) if INTERPRETED else libdevice.exp(b_x)


@triton.jit
def _softplus(b_z):
    """log(1 + exp(z)), precise where exp(z) is small beside 1, too."""
    b_least = tl.minimum(b_z, LINEAR)
    if INTERPRETED:
        b_curved = tl.log(1.0 + tl.exp(b_least.to(tl.float64))).to(tl.float32)
    else:
        b_curved = libdevice.log1p(libdevice.exp(b_least))
    return tl.where(b_z > LINEAR, b_z, b_curved)


@triton.jit
def _sigmoid(b_x):
    return tl.div_rn(1.0, 1.0 + _exp(-b_x))


@triton.jit
def _read(p_a, p_b, p_log, p_bias, o_block, m_block, HEADS: tl.constexpr):
    """z, b and -exp(A), all fp32 [BLOCK]."""
    o_head = o_block % HEADS
    b_bias = tl.load(p_bias + o_head, mask=m_block, other=0.0).to(tl.float32)
    b_z = tl.load(p_a + o_block, mask=m_block, other=0.0).to(tl.float32) + b_bias
    b_decay = -_exp(tl.load(p_log + o_head, mask=m_block, other=0.0).to(tl.float32))
    return b_z, tl.load(p_b + o_block, mask=m_block, other=0.0).to(tl.float32), b_decay


@triton.jit
def _forward_kernel(p_a, p_b, p_log, p_bias, p_beta, p_g, size, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    o_block = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_block = o_block < size
    b_z, b_b, b_decay = _read(p_a, p_b, p_log, p_bias, o_block, m_block, HEADS)
    tl.store(p_beta + o_block, _sigmoid(b_b).to(p_beta.dtype.element_ty), mask=m_block)
    tl.store(p_g + o_block, b_decay * _softplus(b_z), mask=m_block)


@triton.jit
def _backward_kernel(
    p_dbeta, p_dg, p_a, p_b, p_log, p_bias, p_da, p_db, p_dlog, p_dbias, size,
    TRAINED: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """TRAINED: also every position's part of the gradients of A_log and dt_bias."""
    o_block = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_block = o_block < size
    b_z, b_b, b_decay = _read(p_a, p_b, p_log, p_bias, o_block, m_block, HEADS)
    b_dg = tl.load(p_dg + o_block, mask=m_block, other=0.0)
    b_beta = _sigmoid(b_b)
    b_db = tl.load(p_dbeta + o_block, mask=m_block, other=0.0).to(tl.float32) * (1.0 - b_beta) * b_beta
    b_da = b_dg * b_decay
    b_grown = _exp(tl.minimum(b_z, LINEAR))  # sigmoid(z) as PyTorch has it: where z is small the division is by nearly 1
    b_da = tl.where(b_z > LINEAR, b_da, tl.div_rn(b_da * b_grown, b_grown + 1.0))
    tl.store(p_da + o_block, b_da.to(p_da.dtype.element_ty), mask=m_block)
    tl.store(p_db + o_block, b_db.to(p_db.dtype.element_ty), mask=m_block)
    if TRAINED:
        tl.store(p_dlog + o_block, b_dg * (b_decay * _softplus(b_z)), mask=m_block)
        tl.store(p_dbias + o_block, b_da, mask=m_block)


def _launch(kernel: triton.JITFunction, *tensors: Tensor, size: int, heads: int, **constexprs: bool) -> None:
    """Runs a kernel over contiguous tensors, one program for BLOCK of `size` elements."""
    if size == 0:
        return
    block = min(triton.next_power_of_2(size), BLOCK_INTERPRETED) if INTERPRETED.value else BLOCK
    device = torch.cuda.device(tensors[0].device) if tensors[0].is_cuda else contextlib.nullcontext()
    with device:
        kernel[(triton.cdiv(size, block),)](*tensors, size, **constexprs, HEADS=heads, BLOCK=block, num_warps=WARPS)


@torch.library.custom_op("isoloss::decay_gates", mutates_args=())
def _forward(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    beta, g = (torch.empty(a.shape, dtype=dtype, device=a.device) for dtype in (b.dtype, torch.float32))
    dense = (x.contiguous() for x in (a, b, A_log, dt_bias))
    _launch(_forward_kernel, *dense, beta, g, size=a.numel(), heads=len(A_log))
    return beta, g


@_forward.register_fake
def _(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(b.shape, dtype=b.dtype, device=b.device), torch.empty(a.shape, dtype=torch.float32, device=a.device)


@torch.library.custom_op("isoloss::decay_gates_backward", mutates_args=())
def _backward(
    dbeta: Tensor, dg: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, trained: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """da, db, and with `trained` dA_log and d dt_bias, which are of no elements else."""
    da, db = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (a, b))
    heads, rows = len(A_log), a.shape if trained else (0,)
    dlog, dbias = (torch.empty(rows, dtype=torch.float32, device=a.device) for _ in range(2))
    dense = (x.contiguous() for x in (dbeta, dg, a, b, A_log, dt_bias))
    _launch(_backward_kernel, *dense, da, db, dlog, dbias, size=a.numel(), heads=heads, TRAINED=trained)
    if trained:
        dlog, dbias = (x.view(-1, heads).sum(0) for x in (dlog, dbias))
    return da, db, dlog.to(A_log.dtype), dbias.to(dt_bias.dtype)


@_backward.register_fake
def _(
    dbeta: Tensor, dg: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, trained: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (a, b))
    return *like, *(x.new_empty(x.shape if trained else (0,)) for x in (A_log, dt_bias))


def _save_inputs(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dbeta: Tensor, dg: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    gradients = _backward(dbeta, dg, *ctx.saved_tensors, needs[2] or needs[3])
    return tuple(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))


_forward.register_autograd(_differentiate, setup_context=_save_inputs)


def decay_gates(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """beta = sigmoid(b) in b's dtype, and the log decay g = -exp(A_log) softplus(a + dt_bias) in fp32.

    a, b: one shape [..., H], one dtype (bfloat16, float16 or float32); A_log, dt_bias [H], each of these dtypes; one device
    (CUDA, or CPU in Triton's interpreter). Any strides, the results are contiguous. Differentiable once in all four; what
    needs no gradient costs nothing. Raises ValueError for anything else. The formulas: Yang, Kautz and Hatamizadeh 2024,
    arXiv 2412.06464, in the form of transformers' Qwen3_5GatedDeltaNet.
    """
    if a.shape != b.shape or a.dtype != b.dtype or not a.ndim or A_log.shape != a.shape[-1:] or dt_bias.shape != A_log.shape:
        sides = ", ".join(f"{list(side.shape)} {side.dtype}" for side in (a, b, A_log, dt_bias))
        raise ValueError(f"decay_gates: a and b [..., H] of one dtype and A_log and dt_bias [H] are expected, not {sides}")
    wrong = {side.dtype for side in (a, A_log, dt_bias)} - set(DTYPES)
    if wrong or len({side.device for side in (a, b, A_log, dt_bias)}) > 1:
        sides = ", ".join(f"{side.dtype} on {side.device}" for side in (a, b, A_log, dt_bias))
        raise ValueError(f"decay_gates: {', '.join(map(str, DTYPES))} on one device are expected, not {sides}")
    return _forward(a, b, A_log, dt_bias)
