"""The reference: autograd's gradient in the compute dtype, added to the fp32 sum as the optimizer's hook adds it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def stock_linear(x: Tensor, weight: Tensor, master: Tensor, held: Tensor | None) -> Tensor:
    """y = x weight^T, [T, out]. The gradient of `master` is its main gradient after this micro-step: `held` plus this one's.

    x [T, in] and weight [out, in] in the compute dtype; master and held [out, in] in fp32. held: the sum of the micro-steps
    before, None in the first. weight is master in the compute dtype.
    """
    return F.linear(x, _Published.apply(master, weight, held))


class _Published(torch.autograd.Function):
    """The weight that computes, as a function of the master that it was rounded from."""

    @staticmethod
    def forward(ctx, master: Tensor, weight: Tensor, held: Tensor | None) -> Tensor:
        ctx.held, ctx.dtype = held, master.dtype
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        wide = gradient.to(ctx.dtype)
        return wide if ctx.held is None else ctx.held + wide, None, None
