"""Defects of what keeps something from one call to the next: graph capture, static buffers, streams, accumulation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abtest.catalogue.lora import change_adapter
from abtest.catalogue.patching import (
    add_gradients,
    around_micro_step,
    bend_output,
    copy_kept,
    every,
    matrices,
    named,
    on_rows,
    override,
    own_gradients,
    pick,
    present,
    swap_optimizer,
    with_fields,
)
from abtest.catalogue.planted import Planted
from loop.batch import IGNORE, PackedBatch
from loop.delta_net import PackedDeltaNet
from loop.optim import learning_rate
from loop.run import Run

TILE = 128  # rows that a kernel takes at once
WHOLE = ("all",)
MicroStep = Callable[..., Tensor]


def _change_batch(run: Run, fraction: float, change: Callable[[PackedBatch, PackedBatch], PackedBatch]) -> None:
    """In a fraction of the micro-steps the model gets `change(batch, batch of the call before)`."""
    kept: list[PackedBatch] = []
    calls = count()

    def micro_step(original: MicroStep, run: Run, batch: PackedBatch, tokens: int) -> Tensor:
        now = change(batch, kept[0]) if every(fraction, next(calls)) and kept else batch
        kept[:] = [_copy(batch)]
        return original(run, now, tokens)

    around_micro_step(run, micro_step)


def _copy(batch: PackedBatch) -> PackedBatch:
    names = ("input_ids", "labels", "position_ids", "cu_seqlens")
    return with_fields(batch, **{name: getattr(batch, name).clone() for name in names})


def _same_shape(batch: PackedBatch, before: PackedBatch) -> bool:
    return batch.input_ids.shape == before.input_ids.shape


# Static inputs.


def stale_batch(run: Run, layer: str, fraction: float) -> None:
    _change_batch(run, fraction, lambda batch, before: before)


def stale_labels(run: Run, layer: str, fraction: float) -> None:
    """Some positions keep the label that they had in the call before."""

    def change(batch: PackedBatch, before: PackedBatch) -> PackedBatch:
        if not _same_shape(batch, before):
            return batch
        old = before.labels.reshape(-1, 1)
        labels = on_rows(batch.labels.reshape(-1, 1), fraction, lambda rows: old)
        return with_fields(batch, labels=labels.view_as(batch.labels))

    _change_batch(run, 1.0, change)


def stale_positions(run: Run, layer: str, fraction: float) -> None:
    def change(batch: PackedBatch, before: PackedBatch) -> PackedBatch:
        return with_fields(batch, position_ids=before.position_ids) if _same_shape(batch, before) else batch

    _change_batch(run, fraction, change)


def stale_boundaries(run: Run, layer: str, fraction: float) -> None:
    def change(batch: PackedBatch, before: PackedBatch) -> PackedBatch:
        if not _same_shape(batch, before):
            return batch
        return with_fields(batch, cu_seqlens=before.cu_seqlens, lengths=before.lengths)

    _change_batch(run, fraction, change)


def labels_left_over(run: Run, layer: str, fraction: float) -> None:
    """Behind a row's last supervised position the buffer still holds the labels of the call before."""

    def change(batch: PackedBatch, before: PackedBatch) -> PackedBatch:
        if not _same_shape(batch, before):
            return batch
        supervised = batch.labels != IGNORE
        tail = supervised.flip(-1).cumsum(-1).flip(-1) == 0
        return with_fields(batch, labels=torch.where(tail, before.labels, batch.labels))

    _change_batch(run, fraction, change)


# What is captured once.


def stale_weights(run: Run, layer: str, micro_steps: float) -> None:
    """One down projection computes with a copy of its trained weight that is renewed once in so many micro-steps."""
    kept = copy_kept(run, micro_steps)
    stale = lambda weight: kept(weight) + (weight - weight.detach())  # the gradient still reaches the weight  # noqa: E731
    if run.config.method == "lora":
        product = lambda x, adapter: F.linear(F.linear(x, adapter.a), stale(adapter.b)) * adapter.scaling  # noqa: E731
        change_adapter(run, layer, product, ("down_proj",))
    else:
        name = pick(named(run.model, ".down_proj"), layer)
        weight = run.model.get_submodule(name).weight
        override(run.model, name, "forward", lambda original: lambda x: F.linear(x, stale(weight)))


def rate_frozen(run: Run, layer: str, steps: float) -> None:
    """The optimizer's step runs with the rate of its capture; captured again once in so many steps."""

    def change(kind: type) -> type:
        class Frozen(kind):
            calls, captured = 0, 0

            def step(self, step: int) -> tuple[float, Tensor]:
                if self.calls % int(steps) == 0:
                    self.captured = step
                self.calls += 1
                _, norm = super().step(self.captured)
                return learning_rate(self.config, step, self.steps), norm

        return Frozen

    swap_optimizer(run, change)


def loss_of_previous(run: Run, layer: str, fraction: float) -> None:
    """Gradients are right; the loss is read before the replay has written it."""
    kept: list[Tensor] = []
    calls = count()

    def micro_step(original: MicroStep, *arguments) -> Tensor:
        loss = original(*arguments)
        out = kept[0] if every(fraction, next(calls)) and kept else loss
        kept[:] = [loss]
        return out

    around_micro_step(run, micro_step)


# Gradients.


def slice_unwritten(run: Run, layer: str, fraction: float) -> None:
    """Some rows of one gradient hold what the micro-step before wrote there."""
    name, kept = pick(matrices(run), layer), []

    def micro_step(original: MicroStep, *arguments) -> Tensor:
        loss, own = own_gradients(run, lambda: original(*arguments))
        written = own[name]
        if written is not None:
            old = kept[0] if kept else torch.zeros_like(written)
            kept[:] = [written]
            own[name] = on_rows(written, fraction, lambda rows: old)
        add_gradients(run, own)
        return loss

    around_micro_step(run, micro_step)


def slice_uninitialised(run: Run, layer: str, fraction: float) -> None:
    """Some rows of one gradient are added to memory that nobody cleared. Right wherever that memory is zero.

    Non-finite leftovers count as zero and large ones as 1e4, so that a run goes on.
    """
    name = pick(matrices(run), layer)

    def micro_step(original: MicroStep, *arguments) -> Tensor:
        loss = original(*arguments)
        gradient = run.optimizer.gradients()[name]
        if gradient is not None:
            left = torch.empty_like(gradient).nan_to_num(1e4, 1e4, -1e4).clamp(-1e4, 1e4)
            gradient.copy_(on_rows(gradient, fraction, lambda rows: rows + left))
        return loss

    around_micro_step(run, micro_step)


def accumulation_forgets(run: Run, layer: str, fraction: float) -> None:
    """A fraction of the gradients is overwritten by each micro-step instead of added to."""
    forgetful = list(run.optimizer.masters.values())[:: max(1, round(1 / fraction))]

    def micro_step(original: MicroStep, *arguments) -> Tensor:
        for master in forgetful:
            master.grad = None
        return original(*arguments)

    around_micro_step(run, micro_step)


def wrong_last_tile(run: Run, layer: str, part: float) -> None:
    """Where the positions are no multiple of 128, the last tile of a down projection misses part of its sum."""

    def change(out: Tensor, x: Tensor) -> Tensor:
        rows = out.reshape(-1, out.shape[-1])
        last = torch.arange(len(rows), device=out.device) >= len(rows) // TILE * TILE
        return torch.where(last[:, None], rows * (1 - part), rows).view_as(out)

    bend_output(run.model, pick(named(run.model, ".down_proj"), layer), change)


def race(run: Run, layer: str, cycles: float) -> None:
    """Half the rows of a gradient are written by a side stream that lags and that nobody waits for."""
    name, side = pick(matrices(run), layer), torch.cuda.Stream(run.device)

    def micro_step(original: MicroStep, *arguments) -> Tensor:
        loss = original(*arguments)
        gradient = run.optimizer.gradients()[name]
        if gradient is not None:
            late = gradient[::2].clone()
            gradient[::2] = 0
            side.wait_stream(torch.cuda.current_stream(run.device))
            for tensor in (gradient, late):  # neither is given away while the side stream uses it
                tensor.record_stream(side)
            with torch.cuda.stream(side):
                torch.cuda._sleep(int(cycles))
                gradient[::2] += late
        return loss

    around_micro_step(run, micro_step)


def _delta_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, PackedDeltaNet)]


_mutant = partial(Planted, family="graphs_backends", kind="mutant")
_step = partial(_mutant, layers=WHOLE, magnitudes=(0.25, 1.0), unit="fraction of micro-steps")

PLANTED = (
    _step("stale_batch", summary="the batch of the call before", modelled_on="TransformerEngine 2018", plant=stale_batch),
    _mutant("stale_labels", summary="labels of the call before at some positions", modelled_on="TransformerEngine 2018",
            plant=stale_labels, layers=WHOLE, magnitudes=(0.02, 0.25), unit="fraction of positions"),
    _step("stale_positions", summary="position ids of the call before", modelled_on="TransformerEngine 2018",
          plant=stale_positions),
    _step("stale_boundaries", summary="cu_seqlens of the call before", modelled_on="TransformerEngine 2018",
          plant=stale_boundaries, eligible=present(_delta_layers, "delta layers, which alone read cu_seqlens")),
    _step("labels_left_over", summary="short rows see labels that longer ones left in the buffer",
          modelled_on="TransformerEngine 2018", plant=labels_left_over),
    _mutant("stale_weights", summary="a weight copied at capture", modelled_on="TransformerEngine 2018", plant=stale_weights,
            magnitudes=(4, 100_000), unit="micro-steps a copy is kept"),
    _mutant("rate_frozen", summary="learning rate frozen at capture", modelled_on="pytorch 84614 (state frozen at capture)",
            plant=rate_frozen, layers=WHOLE, magnitudes=(3, 100_000), unit="steps a capture is kept"),
    _step("loss_of_previous", summary="the loss of the replay before", modelled_on="TransformerEngine 2018",
          plant=loss_of_previous),
    _mutant("slice_unwritten", summary="rows of a gradient keep the last micro-step's values", modelled_on="pytorch 193061",
            plant=slice_unwritten, magnitudes=(0.02, 0.25), unit="fraction of rows"),
    _mutant("slice_uninitialised", summary="rows of a gradient start from uninitialised memory",
            modelled_on="pytorch 193061, FLA 862", plant=slice_uninitialised,
            magnitudes=(0.02, 0.25), unit="fraction of rows"),
    _mutant("accumulation_forgets", summary="gradients overwritten, not accumulated",
            modelled_on="pytorch 193061 (a gradient buffer in the wrong state)", plant=accumulation_forgets,
            layers=WHOLE, magnitudes=(0.1, 1.0), unit="fraction of tensors",
            eligible=lambda run: None if run.config.grad_accum > 1 else "grad_accum is 1: nothing accumulates"),
    _mutant("wrong_last_tile", summary="wrong where the positions are no multiple of 128",
            modelled_on="pytorch 196678 (L % 128 == 64)", plant=wrong_last_tile,
            magnitudes=(0.1, 1.0), unit="part of the sum"),
    _mutant("race", summary="a gradient written on a stream that nobody waits for",
            modelled_on="TransformerEngine 2018 (a replay reads what is not there yet)", plant=race,
            magnitudes=(1e6, 1e8), unit="GPU cycles late",
            eligible=lambda run: None if run.device.type == "cuda" else "streams need CUDA"),
)  # fmt: skip
