"""A function of single positions, computed for some of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kernels.supervised_logits.kernel import LEAST_ROWS


class _Gather(torch.autograd.Function):
    """x [T, D] -> [S, D]. Its backward copies, where that of `index_select` adds: no row of a gradient comes twice, but for
    zeros, and additions would be atomic."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor) -> Tensor:
        ctx.positions = len(x)
        ctx.save_for_backward(rows)
        return x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return _spread(gradient, rows, ctx.positions), None


class _Spread(torch.autograd.Function):
    """y [S, D] -> [positions, D], zeros elsewhere."""

    @staticmethod
    def forward(ctx, y: Tensor, rows: Tensor, positions: int) -> Tensor:
        ctx.save_for_backward(rows)
        return _spread(y, rows, positions)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return gradient.index_select(0, rows), None, None


def _spread(y: Tensor, rows: Tensor, positions: int) -> Tensor:
    return y.new_zeros(positions, y.shape[1]).index_copy_(0, rows, y)


def on_rows(function: Callable[[Tensor], Tensor], x: Tensor, rows: Tensor) -> Tensor:
    """function(x) at the flat positions `rows`, zeros elsewhere; with fewer than LEAST_ROWS of them, function(x) everywhere.

    x [B, L, D] -> [B, L, D], any floating dtype; function: of each position alone, [..., D] -> [..., D]; rows: int64 [S] on
    x's device. A position that comes more than once must be one whose gradient is zero. Differentiable once.
    """
    B, L, D = x.shape
    if len(rows) < LEAST_ROWS:
        return function(x)
    return _Spread.apply(function(_Gather.apply(x.reshape(B * L, D), rows)), rows, B * L).view(B, L, D)


def mlp_of_rows(mlp: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
    """What `mlp_then_rows` gives, [S, D], computed as the layer computes it: spread over all positions, then looked at."""
    return on_rows(mlp, x, rows).flatten(0, 1).index_select(0, rows)
