"""nn.Embedding whose backward adds rows to the optimizer's fp32 sum, and makes no gradient of the whole table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loop.optim import MasterAdamW

from .kernel import MainGrad


def add_rows_(total: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    """total[ids[i]] += rows[i] for every i, in the dtype of total; the same bits every time.

    total [V, D]; ids [T] int64 in [0, V), any of them several times; rows [T, D]. PyTorch's `index_add_` on CUDA takes rows
    in whatever order they come; `index_put_` sorts them first. On a CPU it is the other way round.
    """
    rows = rows.to(total.dtype)
    return total.index_put_((ids,), rows, accumulate=True) if total.is_cuda else total.index_add_(0, ids, rows)


class MainGradEmbedding(nn.Embedding):
    """The embedding that it is made of, with the same table and the same forward. ids [...] -> [..., dim].

    Of a table of 248,320 rows a pack touches a few thousand. PyTorch's backward makes a gradient of the whole table in the
    table's dtype, which is then cast, and added to the optimizer's sum and, of a tied table, to the head's gradient.
    """

    def __init__(self, embedding: nn.Embedding, optimizer: MasterAdamW) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(embedding.__dict__)  # the parameter and plain attributes alike: names stay
        self.main = MainGrad(optimizer)

    def forward(self, ids: Tensor) -> Tensor:
        return _Embedding.apply(ids, self.weight, self)

    def deliver(self, dy: Tensor, ids: Tensor) -> Tensor | None:
        """dy [T, dim] to the rows ids [T] of the main gradient. Returns what is left for autograd: None, or all of it."""

        def add(held: Tensor | None, into: Tensor | None) -> Tensor:
            if held is None:
                into = torch.empty_like(self.weight, dtype=torch.float32) if into is None else into
                held = into.zero_()
            rows = dy if self.padding_idx is None else dy.masked_fill((ids == self.padding_idx)[:, None], 0)
            return add_rows_(held, ids, rows)

        if self.main.take(self.weight, add):
            return None
        padding = -1 if self.padding_idx is None else self.padding_idx
        return torch.ops.aten.embedding_dense_backward(dy, ids, self.num_embeddings, padding, False)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids: Tensor, weight: Tensor, layer: MainGradEmbedding) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.layer = layer
        return F.embedding(ids, weight, layer.padding_idx)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[None, Tensor | None, None]:
        (ids,) = ctx.saved_tensors
        return None, ctx.layer.deliver(dy.reshape(-1, dy.shape[-1]), ids.reshape(-1)), None
