"""Head and loss in chunks of rows, where values of the logits' gradient below 2^-12 are dropped.

Most of a large vocabulary's softmax is that small, so a kernel could leave most of two products out. Here they are zeroed
and multiplied all the same: what is asked is whether they may be missing. The rest is exact up to rounding, with sums over
chunks in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.supervised_logits.kernel import supervised_rows
from loop.batch import PackedBatch
from negative_results.bf16_head_gradient.kernel import InChunks

THRESHOLD = 2.0**-12  # a 32nd of bf16's eps, in every dtype here
TILE = 1  # every value by itself; Cut Cross-Entropy's kernel drops 128 x 128 values at a time, if all of them are small
CHUNK = 1024  # rows


def filter_(d: Tensor, tile: int = TILE) -> Tensor:
    """Zeroes, in place, every tile x tile of d [N, V] whose values are all below THRESHOLD in size; returns d."""
    rows, columns = d.shape
    kept = F.pad(d.abs() >= THRESHOLD, (0, -columns % tile, 0, -rows % tile))
    if tile > 1:
        kept = kept.unflatten(1, (-1, tile)).unflatten(0, (-1, tile)).any(3).any(1)
        kept = kept.repeat_interleave(tile, 0).repeat_interleave(tile, 1)
    return d.masked_fill_(~kept[:rows, :columns], 0.0)


def filtered_cross_entropy(rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropy of `rows @ weight.T` with `labels`, a fp32 scalar, whose gradient leaves small values out.

    rows [N, D] and weight [V, D] of one dtype and device; labels int64 [N], IGNORE where a row does not count. Logits and
    their gradient are in that dtype, softmax, loss and sums over chunks in fp32. Differentiable once in rows and weight.
    The method: gradient filtering of Cut Cross-Entropy, arXiv 2411.09009, section 4.3.
    """
    return InChunks.apply(rows, weight, labels, CHUNK, torch.float32, filter_)


def head(model: nn.Module, hidden: Tensor, batch: PackedBatch) -> Tensor:
    """hidden [B, L, D] -> fp32 sum of cross-entropy over the batch's supervised positions, 0 where there are none."""
    rows, labels = supervised_rows(hidden, batch)
    return filtered_cross_entropy(rows, model.get_output_embeddings().weight, labels)
