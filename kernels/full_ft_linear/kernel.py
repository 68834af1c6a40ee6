"""nn.Linear whose backward adds the weight's gradient to the optimizer's fp32 sum itself."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kernels.shared_input import SharedInput
from loop.optim import MasterAdamW

NARROW = (torch.bfloat16, torch.float16)
# (held, into) -> the fp32 sum with a gradient added: to `held`, what came before in this step, in place; a first one is
# written to `into`, or where there is none to a new tensor.
Add = Callable[[Tensor | None, Tensor | None], Tensor]


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


class MainGrad:
    """What a layer that trains is told of the optimizer, at every backward: where a weight's gradient goes.

    Nowhere, if it was released or is gone, or if the layer is a copy: then autograd gets it as from PyTorch's layer.
    """

    def __init__(self, optimizer: MasterAdamW) -> None:
        self.optimizer = weakref.ref(optimizer)  # weak: a copy of the model must not copy the optimizer

    def collector(self, weight: nn.Parameter) -> Tensor | None:
        """The fp32 tensor whose `.grad` adds up the weight's gradient."""
        optimizer = self.optimizer()
        return None if optimizer is None else optimizer.collector(weight)

    def take(self, weight: nn.Parameter, add: Add) -> bool:
        """Has a gradient added to the weight's sum. Whether that is known; if not, `add` is not asked, and it is left."""
        collector = self.collector(weight)
        if collector is None:
            return False
        collector.grad = add(collector.grad, self.optimizer().place(collector))
        return True


class MainGradLinear(nn.Linear):
    """The linear layer that it is made of, with the same parameters and the same forward, alone or in a `SharedLinears`.

    Its weight's gradient goes to the optimizer's sum, if `MainGrad` knows it. x [..., in] -> [..., out].
    """

    drops = False

    def __init__(self, linear: nn.Linear, optimizer: MasterAdamW) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.main = MainGrad(optimizer)
        self.shared: SharedLinears | None = None
        self.train(linear.training)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.alone(x) if self.shared is None else self.shared.output(self, x)

    def alone(self, x: Tensor) -> Tensor:
        return linears(x, [self])[0]

    def deliver(self, dy: Tensor, x: Tensor) -> Tensor | None:
        """Adds dy^T x to the weight's main gradient. Returns what is left for autograd: None, or all of it."""
        taken = self.main.take(self.weight, lambda held, into: weight_gradient(dy, x, held, into))
        return None if taken else dy.t() @ x


class SharedLinears(SharedInput):
    """Trained layers of one input as one node, in whose backward each product is added to dx inside its kernel."""

    def together(self, x: Tensor) -> tuple[Tensor, ...]:
        return linears(x, self.members)


def linears(x: Tensor, layers: Sequence[MainGradLinear]) -> tuple[Tensor, ...]:
    """x [..., in] -> [..., out_i] of every layer."""
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    return _Linears.apply(x, tuple(layers), *weights, *biases)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, layers: tuple[MainGradLinear, ...], *parameters: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases = parameters[: len(layers)], parameters[len(layers) :]
        ctx.save_for_backward(x, *weights)
        ctx.layers = layers  # their weights are the parameters; what checkpointing unpacks are detached stand-ins
        ctx.set_materialize_grads(False)
        return tuple(F.linear(x, *pair) for pair in zip(weights, biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        needs_x, _, *needs = ctx.needs_input_grad
        count, seen, dx = len(weights), x.reshape(-1, x.shape[-1]), None
        dw, db = [None] * count, [None] * count
        for index, (dy, weight, layer) in enumerate(zip(dys, weights, ctx.layers, strict=True)):
            if dy is None:
                continue
            rows = dy.reshape(-1, dy.shape[-1])
            if needs_x:
                dx = rows @ weight if dx is None else dx.addmm_(rows, weight)
            dw[index] = layer.deliver(rows, seen) if needs[index] else None
            db[index] = rows.sum(0) if needs[count + index] else None
        return None if dx is None else dx.view(x.shape), None, *dw, *db
