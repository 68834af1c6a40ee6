"""Head and loss in chunks of rows, where the gradient of the head's weight is added up over chunks in the weight's dtype.

The loss and the gradient of the hidden states are what they are without chunks: a row is in one chunk alone. Only the
weight's gradient is a sum over chunks, and in bf16 each of its additions rounds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kernels.supervised_logits.kernel import supervised_rows
from loop.batch import IGNORE, PackedBatch

LEAST_ROWS = 16  # of a chunk: with fewer a BLAS changes to matrix-vector products, which round otherwise


def rows_a_chunk(rows: int, hidden: int, vocabulary: int) -> int:
    """How many rows make logits about as large as all hidden states, a power of two: Liger Kernel's rule to save memory."""
    share = -(-rows // -(-vocabulary // hidden))
    return max(LEAST_ROWS, 1 << max(share - 1, 0).bit_length())


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [K, N] in fp32, whatever dtype both have."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()  # a CPU has no product with a wider result


def loss_and_d_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every row [N] and softmax - onehot [N, V], both in fp32 and zero where a row's label is IGNORE.

    logits [N, V]; labels int64 [N], each below V or IGNORE.
    """
    counts = labels != IGNORE
    target = torch.where(counts, labels, 0)[:, None]
    log_p = logits.float().log_softmax(-1)
    losses = -log_p.gather(1, target)[:, 0] * counts
    d = log_p.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32))
    return losses, d.mul_(counts[:, None])


def linear_cross_entropy(rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropy of `rows @ weight.T` with `labels`, a fp32 scalar. Its gradients are taken in forward.

    rows [N, D] and weight [V, D] of one dtype and device; labels int64 [N], IGNORE where a row does not count. Logits and
    their gradient are in that dtype, softmax and loss in fp32. Differentiable once in rows and weight.
    """
    size = rows_a_chunk(len(rows), weight.shape[1], weight.shape[0])
    return InChunks.apply(rows, weight, labels, size, weight.dtype, None)


class InChunks(torch.autograd.Function):
    """`linear_cross_entropy` in chunks of `size` rows.

    sums: the dtype in which the weight's gradient is added up over chunks, the weight's own or fp32. kept: None, or from a
    chunk's gradient of the logits, fp32 [size, V], what of it goes into both products; it may write in place.
    """

    @staticmethod
    def forward(
        ctx,
        rows: Tensor,
        weight: Tensor,
        labels: Tensor,
        size: int,
        sums: torch.dtype,
        kept: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        needs_rows, needs_weight, *_ = ctx.needs_input_grad
        loss = torch.zeros((), device=rows.device)
        d_rows = torch.zeros_like(rows, dtype=torch.float32) if needs_rows else None
        d_weight = torch.zeros_like(weight, dtype=sums) if needs_weight else None
        for start in range(0, len(rows), size):
            chunk = slice(start, start + size)
            losses, d = loss_and_d_logits(rows[chunk] @ weight.t(), labels[chunk])
            loss, d = loss + losses.sum(), (d if kept is None else kept(d)).to(weight.dtype)
            if needs_rows:
                d_rows[chunk] = product(d, weight)
            if needs_weight:
                # in the weight's dtype it is the defect: in bf16 both the product and the sum round
                d_weight += d.t() @ rows[chunk] if sums == weight.dtype else product(d.t(), rows[chunk])
        ctx.dtype = weight.dtype
        ctx.save_for_backward(d_rows, d_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        d_rows, d_weight = (None if gradient is None else (gradient * dloss).to(ctx.dtype) for gradient in given)
        return d_rows, d_weight, None, None, None, None


def head(model: nn.Module, hidden: Tensor, batch: PackedBatch) -> Tensor:
    """hidden [B, L, D] -> fp32 sum of cross-entropy over the batch's supervised positions, 0 where there are none."""
    rows, labels = supervised_rows(hidden, batch)
    return linear_cross_entropy(rows, model.get_output_embeddings().weight, labels)
