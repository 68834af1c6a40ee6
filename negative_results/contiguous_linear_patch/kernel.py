"""A linear layer that copies its weight's transpose at every call, so that the product reads it row by row."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def contiguous_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in], weight [out, in], bias [out] or None -> [..., out]; one floating dtype and device. Autograd keeps the
    copy of the weight until backward, which multiplies by it and transposes its gradient back."""
    transposed = weight.t().contiguous()
    if bias is None:
        return torch.matmul(x, transposed)
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), transposed).view(*x.shape[:-1], len(weight))


class ContiguousLinear(nn.Linear):
    """The linear layer that it is made of, with the same parameters."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return contiguous_linear(x, self.weight, self.bias)
