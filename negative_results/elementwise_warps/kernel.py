"""The kernels of silu_mul, launched with another number of warps a program."""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

from kernels.silu_mul import kernel as silu_mul

CHOICES = (1, 2, 4, 8, 16, 32)  # all that CUDA's 1024 threads a block allow


def _launch(kernel: triton.JITFunction, warps: int, *tensors: Tensor) -> None:
    size = tensors[0].numel()
    if size == 0:
        return
    interpreted = silu_mul.INTERPRETED.value
    block = min(triton.next_power_of_2(size), silu_mul.BLOCK_INTERPRETED) if interpreted else silu_mul.BLOCK
    device = torch.cuda.device(tensors[0].device) if tensors[0].is_cuda else contextlib.nullcontext()
    with device:
        kernel[(triton.cdiv(size, block),)](*tensors, size, BLOCK=block, num_warps=warps)


@torch.library.custom_op("isoloss::silu_mul_warps", mutates_args=())
def _forward(gate: Tensor, up: Tensor, warps: int) -> Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _launch(silu_mul._forward_kernel, warps, gate.contiguous(), up.contiguous(), y)
    return y


@_forward.register_fake
def _(gate: Tensor, up: Tensor, warps: int) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@torch.library.custom_op("isoloss::silu_mul_warps_backward", mutates_args=())
def _backward(dy: Tensor, gate: Tensor, up: Tensor, warps: int) -> tuple[Tensor, Tensor]:
    dgate, dup = (torch.empty(side.shape, dtype=side.dtype, device=side.device) for side in (gate, up))
    _launch(silu_mul._backward_kernel, warps, dy.contiguous(), gate.contiguous(), up.contiguous(), dgate, dup)
    return dgate, dup


@_backward.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor, warps: int) -> tuple[Tensor, Tensor]:
    dgate, dup = (torch.empty(side.shape, dtype=side.dtype, device=side.device) for side in (gate, up))
    return dgate, dup


def _save(ctx, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    gate, up, ctx.warps = inputs
    ctx.save_for_backward(gate, up)


def _differentiate(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_backward(dy, *ctx.saved_tensors, ctx.warps), None


_forward.register_autograd(_differentiate, setup_context=_save)


def silu_mul_with_warps(gate: Tensor, up: Tensor, warps: int) -> Tensor:
    """silu(gate) * up as `kernels.silu_mul` computes it, by programs of `warps` warps, one of CHOICES.

    gate, up: one shape [...], one dtype (bfloat16, float16 or float32), one device; any strides, the result is contiguous.
    Differentiable once in both. Raises ValueError for anything else.
    """
    if warps not in CHOICES:
        raise ValueError(f"silu_mul_with_warps: {warps} warps; one of {', '.join(map(str, CHOICES))} is expected")
    sides = [(side.shape, side.dtype, side.device) for side in (gate, up)]
    if sides[0] != sides[1] or gate.dtype not in silu_mul.DTYPES:
        words = " and ".join(f"{list(shape)} {dtype} on {device}" for shape, dtype, device in sides)
        raise ValueError(f"silu_mul_with_warps: gate and up must agree, in bf16, fp16 or fp32, not {words}")
    return _forward(gate, up, warps)
