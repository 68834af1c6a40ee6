"""Defects of what the loss is divided by, and of which token each position is to predict."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abtest.catalogue.patching import (
    add_gradients,
    around_micro_step,
    chosen,
    own_gradients,
    pick,
    wide,
    with_fields,
    wrap_head,
)
from abtest.catalogue.planted import Planted
from loop.batch import IGNORE, PackedBatch
from loop.run import Run

WHOLE = ("all",)


def documents_of(batch: PackedBatch) -> Tensor:
    """The number of each position's document, int64 [B * L] on the batch's device."""
    lengths = torch.tensor(batch.lengths)
    return torch.arange(len(lengths)).repeat_interleave(lengths).to(batch.labels.device)


# What the loss is divided by.


def _divide_by(run: Run, change: Callable[[PackedBatch, int], float]) -> None:
    """A micro-step divides its sum by `change(batch, the step's supervised tokens)`; one without labels is left alone."""

    def micro_step(original: Callable[..., Tensor], run: Run, batch: PackedBatch, tokens: int) -> Tensor:
        return original(run, batch, change(batch, tokens) if batch.supervised_tokens else tokens)

    around_micro_step(run, micro_step)


def mean_of_means(run: Run, layer: str, part: float) -> None:
    """Each micro-step divides by its own tokens and the number of micro-steps, part of the way on a logarithmic scale."""
    steps = run.config.grad_accum

    def tokens_of(batch: PackedBatch, tokens: int) -> float:
        alone = batch.supervised_tokens == tokens  # the only micro-step of its step: the mean of one mean
        return tokens if alone else tokens * (steps * batch.supervised_tokens / tokens) ** part

    _divide_by(run, tokens_of)


def unshifted_count(run: Run, layer: str, fraction: float) -> None:
    """In a fraction of the documents the first token counts too, though nothing predicts it."""

    def tokens_of(batch: PackedBatch, tokens: int) -> float:
        extra = sum(chosen(index, fraction) for index in range(len(batch.lengths)))
        return tokens * (1 + extra / batch.supervised_tokens)

    _divide_by(run, tokens_of)


def ignored_counted(run: Run, layer: str, fraction: float) -> None:
    """A fraction of the positions without a label counts as if it had one."""

    def tokens_of(batch: PackedBatch, tokens: int) -> float:
        ignored = batch.positions - batch.supervised_tokens
        return tokens * (1 + fraction * ignored / batch.supervised_tokens)

    _divide_by(run, tokens_of)


def divided_twice(run: Run, layer: str, part: float) -> None:
    """Divided by the number of micro-steps once more, to the power `part`."""
    _divide_by(run, lambda batch, tokens: tokens * run.config.grad_accum**part)


def layer_divided_twice(run: Run, layer: str, part: float) -> None:
    """As `divided_twice`, but only the gradients of one layer's parameters, as where layers are scaled one by one."""
    found = (re.search(r"layers\.\d+\.", name) for name in run.optimizer.masters)
    own_layer = pick(dict.fromkeys(match.group() for match in found if match), layer)
    factor = run.config.grad_accum**-part

    def micro_step(original: Callable[..., Tensor], *arguments) -> Tensor:
        loss, own = own_gradients(run, lambda: original(*arguments))
        scaled = {n: g * factor if g is not None and own_layer in n else g for n, g in own.items()}
        add_gradients(run, scaled)
        return loss

    around_micro_step(run, micro_step)


def document_means(run: Run, layer: str, part: float) -> None:
    """Every document weighs the same, however many labels it has; part of the way from every label weighing the same."""

    def weights(batch: PackedBatch) -> Tensor:
        documents, supervised = documents_of(batch), (batch.labels.flatten() != IGNORE).float()
        counts = torch.zeros(len(batch.lengths), device=supervised.device).index_add_(0, documents, supervised)
        mean = supervised.sum() / (counts > 0).sum().clamp(min=1)
        return 1 + part * (mean / counts.clamp(min=1)[documents] - 1)

    def head(model: nn.Module, hidden: Tensor, batch: PackedBatch) -> Tensor:
        logits = wide(model.get_output_embeddings()(hidden)).flatten(0, 1)
        losses = F.cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORE, reduction="none")
        return (losses * weights(batch)).sum()

    wrap_head(run, lambda original: head)


# Which token a position predicts. What the loss is divided by stays the true number of labels.


def _change_labels(run: Run, change: Callable[[Tensor, PackedBatch], Tensor]) -> None:
    """The loss head gets `change(labels [B * L], batch)`."""

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def head(model: nn.Module, hidden: Tensor, batch: PackedBatch) -> Tensor:
            labels = change(batch.labels.flatten(), batch).view_as(batch.labels)
            return original(model, hidden, with_fields(batch, labels=labels))

        return head

    wrap_head(run, make)


def shifted_twice(run: Run, layer: str, fraction: float) -> None:
    """In a fraction of the documents every position predicts the token after the next."""

    def change(labels: Tensor, batch: PackedBatch) -> Tensor:
        later = labels.roll(-1)
        later[batch.cu_seqlens[1:].long() - 1] = IGNORE
        return torch.where(chosen(documents_of(batch), fraction), later, labels)

    _change_labels(run, change)


def next_document_predicted(run: Run, layer: str, fraction: float) -> None:
    """At a fraction of the boundaries within a row, the last token predicts the first of the document behind it."""

    def change(labels: Tensor, batch: PackedBatch) -> Tensor:
        ends = [end for index, end in enumerate(torch.tensor(batch.lengths).cumsum(0).tolist()) if chosen(index, fraction)]
        inside = [end for end in ends if end % batch.labels.shape[1]]
        starts = torch.tensor(inside, dtype=torch.int64, device=labels.device)
        return labels.index_copy(0, starts - 1, batch.input_ids.flatten()[starts])

    _change_labels(run, change)


def first_labels_lost(run: Run, layer: str, fraction: float) -> None:
    """What masks the prompt is shifted once more than the labels: each answer's first label is lost, in some documents."""

    def change(labels: Tensor, batch: PackedBatch) -> Tensor:
        after_ignored = (labels == IGNORE).roll(1)
        after_ignored[batch.cu_seqlens[:-1].long()] = True
        return labels.masked_fill(after_ignored & chosen(documents_of(batch), fraction), IGNORE)

    _change_labels(run, change)


def ignored_trained(run: Run, layer: str, fraction: float) -> None:
    """In a fraction of the documents the prompt is trained on too."""

    def change(labels: Tensor, batch: PackedBatch) -> Tensor:
        following = batch.input_ids.flatten().roll(-1)
        following[batch.cu_seqlens[1:].long() - 1] = IGNORE
        return torch.where((labels == IGNORE) & chosen(documents_of(batch), fraction), following, labels)

    _change_labels(run, change)


def _accumulates(run: Run) -> str | None:
    return None if run.config.grad_accum > 1 else "grad_accum is 1: nothing accumulates"


_mutant = partial(Planted, family="normalisation", kind="mutant")
_whole = partial(_mutant, layers=WHOLE)
_labels = partial(_whole, magnitudes=(0.25, 1.0), unit="fraction of documents")

PLANTED = (
    _whole("mean_of_means", summary="micro-steps divide by their own token counts",
           modelled_on="transformers 34191, unsloth 1134", plant=mean_of_means, magnitudes=(0.1, 1.0),
           unit="part of the way", eligible=_accumulates),
    _labels("unshifted_count", summary="divided by the number of labels before the shift",
            modelled_on="transformers 46204", plant=unshifted_count),
    _whole("ignored_counted", summary="positions without a label count in the denominator",
           modelled_on="transformers 46204 (the wrong labels counted)", plant=ignored_counted,
           magnitudes=(0.02, 1.0), unit="fraction of ignored positions"),
    _whole("divided_twice", summary="loss divided by accumulation twice", modelled_on="unsloth 5036", plant=divided_twice,
           magnitudes=(0.02, 1.0), unit="exponent of the second division", eligible=_accumulates),
    _mutant("layer_divided_twice", summary="one layer's gradients divided by accumulation twice",
            modelled_on="unsloth 5036, in one layer", plant=layer_divided_twice, magnitudes=(0.02, 1.0),
            unit="exponent of the second division", eligible=_accumulates),
    _whole("document_means", summary="a mean over documents of their mean losses",
           modelled_on="transformers 34191 (a mean of means)", plant=document_means, magnitudes=(0.1, 1.0),
           unit="part of the way"),
    _labels("labels_shifted_twice", summary="positions predict the token after the next",
            modelled_on="transformers 47394", plant=shifted_twice),
    _labels("next_document_predicted", summary="a document's last token predicts the next one's first",
            modelled_on="torchtitan 4075", plant=next_document_predicted),
    _labels("first_labels_lost", summary="mask shifted once more than the labels",
            modelled_on="transformers 47394 (labels and mask shifted differently)", plant=first_labels_lost),
    _labels("ignored_trained", summary="prompts are trained on", modelled_on="transformers 46204 (labels not as masked)",
            plant=ignored_trained),
)  # fmt: skip
