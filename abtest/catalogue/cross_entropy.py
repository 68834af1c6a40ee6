"""Defects of the loss head: logits, softmax, and the gradients that fused heads compute themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abtest.catalogue.patching import (
    bend_gradient,
    bend_output,
    on_rows,
    override,
    value_with_gradient_of,
    wide,
    with_fields,
    with_parameters,
    wrap_head,
)
from abtest.catalogue.patching import round_mantissa as rounded
from abtest.catalogue.planted import Planted
from loop.batch import IGNORE, PackedBatch
from loop.run import Run

TILE = 64  # rows that a kernel takes at once


def _projection(run: Run) -> str:
    """The name of the module that gives the logits."""
    head = run.model.get_output_embeddings()
    return next(name for name, module in run.model.named_modules() if module is head)


# The softmax's gradient.


def softmax_gradient(probabilities: Tensor, labels: Tensor) -> Tensor:
    """The gradient of each row's loss [T, V], fp32: p, less 1 at the label. Works in place."""
    probabilities[torch.arange(len(labels), device=labels.device), labels] -= 1
    return probabilities


def own_backward(run: Run, gradient: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The head has a backward of its own: of the logits, `gradient(probabilities [T, V], labels [T] or IGNORE)`.

    Rows without a label get none whatever it returns; there it sees the label 0. The loss stays right to the bit.
    """

    def head(model: nn.Module, hidden: Tensor, batch: PackedBatch) -> Tensor:
        labels = batch.labels.flatten()
        logits = wide(model.get_output_embeddings()(hidden)).flatten(0, 1)
        with torch.no_grad():
            own = gradient(logits.softmax(-1), labels).masked_fill_((labels == IGNORE)[:, None], 0)
        loss = F.cross_entropy(logits.detach(), labels, ignore_index=IGNORE, reduction="sum")
        return value_with_gradient_of(loss, (logits * own).sum())

    wrap_head(run, lambda original: head)


def _bent(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """`change(right gradient [T, V], labels [T])`."""
    return lambda p, labels: change(softmax_gradient(p, labels.clamp(min=0)), labels)


def true_class_rounded(run: Run, layer: str, bits_lost: float) -> None:
    """p of the label is rounded before 1 is subtracted: where p is almost 1, nothing right is left of the difference."""

    def gradient(p: Tensor, labels: Tensor) -> Tensor:
        index = labels.clamp(min=0)[:, None]
        return softmax_gradient(p.scatter(1, index, rounded(p.gather(1, index), bits_lost)), index[:, 0])

    own_backward(run, gradient)


def small_gradients_dropped(run: Run, layer: str, threshold: float) -> None:
    own_backward(run, _bent(lambda d, labels: d.masked_fill_(d.abs() < threshold, 0)))


def scaled_by_first_row(run: Run, layer: str, part: float) -> None:
    """Rows get the incoming gradient of their tile's first row, in part: none where that has no label."""

    def change(d: Tensor, labels: Tensor) -> Tensor:
        first = torch.arange(len(labels), device=labels.device) // TILE * TILE
        return d * torch.where(labels[first] == IGNORE, 1 - part, 1.0)[:, None]

    own_backward(run, _bent(change))


def chunk_without_gradient(run: Run, layer: str, fraction: float) -> None:
    """The rows of one chunk, from the first quarter on, get no gradient."""

    def change(d: Tensor, labels: Tensor) -> Tensor:
        start = len(d) // 4
        d[start : start + max(1, round(fraction * len(d)))] = 0
        return d

    own_backward(run, _bent(change))


# Logits.


def vocabulary_cut(run: Run, layer: str, fraction: float) -> None:
    """The last columns of the vocabulary are missing from the sum of exponentials; labels among them are still found."""

    def head(model: nn.Module, hidden: Tensor, batch: PackedBatch) -> Tensor:
        labels = batch.labels.flatten()
        logits = wide(model.get_output_embeddings()(hidden)).flatten(0, 1)
        columns = torch.arange(logits.shape[1], device=logits.device)
        missing = (columns >= round((1 - fraction) * len(columns))) & (columns != labels[:, None])
        return F.cross_entropy(logits.masked_fill(missing, -torch.inf), labels, ignore_index=IGNORE, reduction="sum")

    wrap_head(run, lambda original: head)


def logits_rounded(run: Run, layer: str, bits_lost: float) -> None:
    bend_output(run.model, _projection(run), lambda logits, hidden: rounded(logits, bits_lost))


def ignored_read_as_class(run: Run, layer: str, fraction: float) -> None:
    """The label -100 is taken for a column, counted from the end, in a fraction of the rows that have it."""

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def head(model: nn.Module, hidden: Tensor, batch: PackedBatch) -> Tensor:
            column = max(model.get_output_embeddings().weight.shape[0] + IGNORE, 0)
            rows = batch.labels.reshape(-1, 1)
            labels = on_rows(rows, fraction, lambda rows: rows.masked_fill(rows == IGNORE, column))
            return original(model, hidden, with_fields(batch, labels=labels.view_as(batch.labels)))

        return head

    wrap_head(run, make)


# Gradients of the last hidden states and of the vocabulary's weight.


def rows_overwritten(run: Run, layer: str, fraction: float) -> None:
    """An offset overflowed: a fraction of dh's rows holds those of half the positions away."""

    def overwrite(dh: Tensor) -> Tensor:
        return on_rows(dh, fraction, lambda rows: rows.roll(len(rows) // 2, 0))

    wrap_head(run, lambda original: lambda model, hidden, batch: original(model, bend_gradient(hidden, overwrite), batch))


def dw_doubled(run: Run, layer: str, part: float) -> None:
    """What the head adds to the gradient of a weight that it shares with the embedding is added again, in part."""
    with_parameters(run.model, _projection(run), weight=lambda w: bend_gradient(w, lambda dw: dw * (1 + part)))


class _PartialSums(torch.autograd.Function):
    """x [..., D] @ weight [V, D].T; dW is a sum over blocks of TILE // 4 rows that is rounded every time one is added."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bits_lost: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bits_lost = bits_lost
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        total = wide(torch.zeros_like(weight))
        blocks = (tensor.flatten(0, -2).split(TILE // 4) for tensor in (dy, x))
        for own_dy, own_x in zip(*blocks, strict=True):
            total = rounded(total + wide(own_dy).T @ wide(own_x), ctx.bits_lost)
        return dy @ weight, total.to(weight.dtype), None


def dw_summed_in_fewer_bits(run: Run, layer: str, bits_lost: float) -> None:
    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        projection = original.__self__
        return lambda x: _PartialSums.apply(x, projection.weight, bits_lost)

    override(run.model, _projection(run), "forward", make)


_mutant = partial(Planted, family="cross_entropy", kind="mutant", layers=("all",))
_rows = partial(_mutant, magnitudes=(0.02, 0.25), unit="fraction of rows")

PLANTED = (
    _mutant("true_class_rounded", summary="p of the label rounded before 1 is subtracted", modelled_on="Liger 1329",
            plant=true_class_rounded, magnitudes=(15, 16), unit="mantissa bits lost"),
    _mutant("scaled_by_first_row", summary="gradient scaled by that of a tile's first row", modelled_on="Liger 1298",
            plant=scaled_by_first_row, magnitudes=(0.03, 1.0), unit="part of the gradient"),
    _mutant("small_gradients_dropped", summary="small softmax gradients skipped",
            modelled_on="the gradient filter of Cut Cross-Entropy (arXiv 2411.09009), where 2**-12 is taken for zero",
            plant=small_gradients_dropped, magnitudes=(2**-12, 2**-8), unit="of a gradient's size"),
    _rows("chunk_without_gradient", summary="one chunk's gradient never written",
          modelled_on="pytorch 193061", plant=chunk_without_gradient),
    _mutant("vocabulary_cut", summary="the softmax leaves out the end of the vocabulary",
            modelled_on="FLA 1080 (part of the logits out of reach)", plant=vocabulary_cut,
            magnitudes=(0.1, 0.5), unit="fraction of columns"),
    _mutant("logits_rounded", summary="logits in TF32 or bf16", modelled_on="transformers 48428, 29285",
            plant=logits_rounded, magnitudes=(13, 16), unit="mantissa bits lost",
            eligible=lambda run: None if run.dtype == torch.float32 else "the run computes in bf16 already"),
    _rows("ignored_read_as_class", summary="ignored labels read as a column", modelled_on="FLA 1080 (a wrong offset)",
          plant=ignored_read_as_class),
    _rows("rows_overwritten", summary="rows of dh hold another position's, finite", modelled_on="FLA 1080",
          plant=rows_overwritten),
    _mutant("head_dw_doubled", summary="the tied weight's gradient from the head added twice",
            modelled_on="torchtitan 3174", plant=dw_doubled, magnitudes=(0.02, 1.0), unit="part of the second time",
            methods=("full",)),
    _mutant("head_dw_in_fewer_bits", summary="dW of the head summed over chunks in bf16 or fp8", modelled_on="Liger 830",
            plant=dw_summed_in_fewer_bits, magnitudes=(16, 20), unit="mantissa bits lost", methods=("full",)),
)  # fmt: skip
