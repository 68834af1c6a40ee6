"""Leaks from one document to the next that the catalogue doesn't have: functions of a run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from abtest.catalogue.patching import around_micro_step, bend_gradient, bend_output, named, override, pick, with_fields
from loop.batch import PackedBatch
from loop.model import cross_entropy_head
from loop.run import Run


def label_across(run: Run) -> None:
    """The last token of a document is taught the first token of the next."""

    def head(model: nn.Module, hidden: Tensor, batch: PackedBatch) -> Tensor:
        labels, ids = batch.labels.flatten().clone(), batch.input_ids.flatten()
        ends = batch.cu_seqlens[1:-1].long() - 1
        labels[ends] = ids[ends + 1]
        return cross_entropy_head(model, hidden, with_fields(batch, labels=labels.view_as(batch.labels)))

    run.loss_head = head


def gradient_across(run: Run) -> None:
    """Forward is right; a little of what flows back moves one position to the left, over boundaries too."""

    def change(gradient: Tensor) -> Tensor:
        return gradient + 1e-6 * gradient.roll(-1, -2)

    bend_output(run.model, pick(named(run.model, ".mlp"), "first"), lambda out, *inputs: bend_gradient(out, change))


def step_leaks(run: Run) -> None:
    """What a captured graph might do: model and head, called by themselves, are right."""

    def change(original, run: Run, batch: PackedBatch, tokens: int) -> Tensor:
        loss = original(run, batch, tokens)
        master = next(iter(run.optimizer.masters.values()))
        master.grad += 1e-9 * batch.input_ids.float().mean()
        return loss

    around_micro_step(run, change)


def one_boundary(number: int) -> Callable[[Run], None]:
    """The convolution of the first delta layer reads over one boundary alone."""

    def plant(run: Run) -> None:
        name = pick([name for name, module in run.model.named_modules() if name.endswith("linear_attn")], "first")

        def make(original):
            def convolve(x: Tensor, pack):
                out, at = original(x, pack), pack.cu_seqlens_cpu.tolist()[:-1][number % len(pack.lengths)]
                return out + 1e-3 * nn.functional.one_hot(torch.tensor(at), x.shape[1])[:, None] * x.roll(1, 1)

            return convolve

        override(run.model, name, "convolve", make)

    return plant
