"""nn.Linear whose backward adds the weight's gradient to the optimizer's fp32 sum itself."""

from __future__ import annotations

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loop.optim import MasterAdamW

NARROW = (torch.bfloat16, torch.float16)


def weight_gradient(dy: Tensor, x: Tensor, held: Tensor | None = None, into: Tensor | None = None) -> Tensor:
    """dy^T x, added to `held` in place where there is one, else written to `into` where that is given.

    dy [T, out], x [T, in], one dtype and device, any strides; held, into and the result [out, in], in fp32 where the inputs
    are narrower, else in their dtype. On CUDA the product of narrow inputs is summed and added in fp32, and never rounded in
    between. PyTorch's CPU products have no wider result: there it is rounded to the inputs' dtype, then added in fp32.
    """
    transposed = dy.t()
    if dy.dtype not in NARROW:
        return torch.mm(transposed, x, out=into) if held is None else held.addmm_(transposed, x)
    if not dy.is_cuda:
        product = transposed @ x
        if held is None:
            return product.float() if into is None else into.copy_(product)
        return held.add_(product)
    if held is None:
        return torch.mm(transposed, x, out_dtype=torch.float32, out=into)
    return torch.addmm(held, transposed, x, out_dtype=torch.float32, out=held)


class MainGradLinear(nn.Linear):
    """The linear layer that it is made of, with the same parameters and the same forward.

    The optimizer is asked at every backward where the weight's gradient goes. Where it does not say (it was released, or is
    gone, or this is a copy of the layer), autograd gets the gradient as it would from nn.Linear. x [..., in] -> [..., out].
    """

    def __init__(self, linear: nn.Linear, optimizer: MasterAdamW) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.optimizer = weakref.ref(optimizer)  # weak: a copy of the model must not copy the optimizer
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self.weight, self.bias, self)

    def deliver(self, dy: Tensor, x: Tensor) -> Tensor | None:
        """Adds dy^T x to the weight's main gradient. Returns what is left for autograd: None, or all of it."""
        optimizer = self.optimizer()
        collector = None if optimizer is None else optimizer.collector(self.weight)
        if collector is None:
            return dy.t() @ x
        collector.grad = weight_gradient(dy, x, collector.grad, optimizer.place(collector))
        return None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, layer: MainGradLinear) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer = layer  # its weight is the parameter itself; what checkpointing unpacks is a detached stand-in
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dx = (rows @ weight).view(x.shape) if needs_x else None
        dw = ctx.layer.deliver(rows, x.reshape(-1, x.shape[-1])) if needs_weight else None
        return dx, dw, rows.sum(0) if needs_bias else None, None
