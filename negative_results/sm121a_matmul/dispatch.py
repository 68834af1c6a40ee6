"""A linear layer whose three products are each computed by the tile that the table names for them, else by cuBLAS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kernels.contract import Needs

from .table import Tiles, bucket
from .tile import Tile


@dataclass(frozen=True)
class Engine:
    """A matmul kernel and what belongs to it: `sm121a_matmul` is one, `tma_matmul` another.

    name: its folder's. table: the file with what was measured. tiles: what the tuner chooses from. matmul(a, b, tile): the
    product, for what takes(a, b) says yes to; cuBLAS computes the rest.
    """

    name: str
    table: Path
    needs: Needs
    tiles: tuple[Tile, ...]
    matmul: Callable[[Tensor, Tensor, Tile], Tensor]
    takes: Callable[[Tensor, Tensor], bool]


Product = Callable[[str, Tensor, Tensor], Tensor]  # "y", "dx" or "dw", and the two matrices


def linear(x: Tensor, weight: Tensor, product: Product) -> Tensor:
    """x weight^T, [..., out], with every product, forward and backward, from `product`.

    x [..., in] and weight [out, in], one dtype and device, any strides. Differentiable once in both; what needs no gradient
    costs no product and is not kept.
    """
    return _Linear.apply(x, weight, product)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, product: Product) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.product, ctx.shape = product, x.shape
        y = product("y", _rows(x), weight.t())
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = _rows(dy)
        dx = None if weight is None else ctx.product("dx", rows, weight).view(ctx.shape)
        dw = None if x is None else ctx.product("dw", rows.t(), _rows(x))
        return dx, dw, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class DispatchedLinear(nn.Linear):
    """The linear layer that it is made of, with the same weight. x [..., in] -> [..., out].

    tiles: by product and bucket of rows. A product that has none, or whose operands the engine does not take, is torch.mm's.
    """

    def __init__(self, linear: nn.Linear, engine: Engine, tiles: Tiles) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.engine, self.tiles = engine, dict(tiles)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.product)

    def product(self, kind: str, left: Tensor, right: Tensor) -> Tensor:
        tile = self.tiles.get((kind, bucket(left.shape[1 if kind == "dw" else 0])))
        if tile is None or not self.engine.takes(left, right):
            return torch.mm(left, right)
        return self.engine.matmul(left, right, tile)
