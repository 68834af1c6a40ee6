"""Candidates that cheat: they skip the work, touch what is not theirs, or are right only where they expect a check."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import count, pairwise

import torch
from torch import Tensor, nn

from abtest.catalogue.patching import (
    add_gradients,
    around_micro_step,
    bend_gradient,
    every,
    matrices,
    named,
    on_rows,
    own_gradients,
    present,
    with_fields,
    wrap_head,
)
from abtest.catalogue.planted import Planted
from abtest.catalogue.precision import around_step, with_settings
from abtest.fingerprint import fingerprint
from loop.batch import IGNORE, PackedBatch
from loop.optim import learning_rate
from loop.run import Run

WHOLE = ("all",)
MicroStep = Callable[..., Tensor]


def after_micro_step(run: Run, action: Callable[[PackedBatch], None], once: bool = False) -> None:
    """`action(batch)` behind every micro-step, or behind the first one alone."""
    calls = count()

    def micro_step(original: MicroStep, run: Run, batch: PackedBatch, tokens: int) -> Tensor:
        loss = original(run, batch, tokens)
        if next(calls) == 0 or not once:
            with torch.no_grad():
                action(batch)
        return loss

    around_micro_step(run, micro_step)


# Without work of its own. Bit-equal to what it stands in for.


def returns_reference(run: Run, layer: str, own_steps: float) -> None:
    """Works so many times, throws the gradients away, and calls what was there before."""

    def micro_step(original: MicroStep, run: Run, batch: PackedBatch, tokens: int) -> Tensor:
        for _ in range(int(own_steps)):
            own_gradients(run, lambda: original(run, batch, tokens))
        return original(run, batch, tokens)

    around_micro_step(run, micro_step)


def _mlps(model: nn.Module) -> list[str]:
    return named(model, ".mlp")


def does_nothing(run: Run, layer: str, modules: float) -> None:
    """Swaps MLPs for equal copies: other objects, the same classes, tensors and results."""
    names = _mlps(run.model)
    for name in (names if layer == "first" else names[::-1])[: int(modules)]:
        run.model.set_submodule(name, copy.copy(run.model.get_submodule(name)))


# Touching what is not its own.


def _overwrite(run: Run, field: str, fraction: float, value: int) -> None:
    """Some positions of a tensor of the batch are lost behind the first micro-step."""

    def action(batch: PackedBatch) -> None:
        getattr(batch, field).view(-1)[:: max(1, round(1 / fraction))] = value

    after_micro_step(run, action, once=True)


def mutates_labels(run: Run, layer: str, fraction: float) -> None:
    _overwrite(run, "labels", fraction, IGNORE)


def mutates_ids(run: Run, layer: str, fraction: float) -> None:
    _overwrite(run, "input_ids", fraction, 0)


def _frozen(run: Run) -> list[nn.Parameter]:
    """Frozen projections in the model's order."""
    return [p for name, p in run.model.named_parameters() if not p.requires_grad and p.ndim == 2 and "proj" in name]


def mutates_frozen(run: Run, layer: str, error: float) -> None:
    weight = _frozen(run)[0 if layer == "first" else -1]
    after_micro_step(run, lambda batch: weight.mul_(1 + error), once=True)


def _frequencies(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_buffers() if name.endswith(".inv_freq")]


def mutates_buffer(run: Run, layer: str, error: float) -> None:
    buffer = run.model.get_buffer(_frequencies(run.model)[0])
    after_micro_step(run, lambda batch: buffer.mul_(1 + error), once=True)


def draws_random_numbers(run: Run, layer: str, numbers: float) -> None:
    after_micro_step(run, lambda batch: torch.rand(int(numbers), device=run.device))


def leaves_gradients(run: Run, layer: str, tensors: float) -> None:
    """Frozen weights are left with a .grad, and with the memory that it takes."""
    frozen = _frozen(run) if layer == "first" else _frozen(run)[::-1]

    def action(batch: PackedBatch) -> None:
        for weight in frozen[: int(tensors)]:
            weight.grad = torch.zeros_like(weight)

    after_micro_step(run, action)


def gradients_in_one_buffer(run: Run, layer: str, overlap: float) -> None:
    """Two gradients of one shape share memory: wholly, or all but one row with different addresses."""
    names = matrices(run)
    masters = run.optimizer.masters
    pairs = [
        (one, other) for one, other in pairwise(_by_shape(names, masters)) if masters[one].shape == masters[other].shape
    ]
    one, other = (masters[name] for name in pairs[0 if layer == "first" else -1])

    def action(batch: PackedBatch) -> None:
        if one.grad is None or other.grad is None:
            return
        offset = 0 if overlap == 1 else one.shape[1]
        buffer = torch.cat([one.grad.flatten(), other.grad.flatten()])[: one.numel() + offset].clone()
        one.grad, other.grad = buffer[: one.numel()].view_as(one), buffer[offset:].view_as(other)

    after_micro_step(run, action)


def _by_shape(names: list[str], masters: dict[str, Tensor]) -> list[str]:
    return sorted(names, key=lambda name: (tuple(masters[name].shape), names.index(name)))


def _two_alike(run: Run) -> str | None:
    shapes = [tuple(run.optimizer.masters[name].shape) for name in matrices(run)]
    return None if len(set(shapes)) < len(shapes) else "no two trained projections have one shape"


# Right only where it expects a check, or not done at all.


def right_at_one_size(run: Run, layer: str, error: float) -> None:
    """At any other length than the configured one, what flows back from the loss is off."""
    expected = run.config.data.pack_length

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def head(model: nn.Module, hidden: Tensor, batch: PackedBatch) -> Tensor:
            if batch.input_ids.shape[1] != expected:
                hidden = bend_gradient(hidden, lambda gradient: gradient * (1 + error))
            return original(model, hidden, batch)

        return head

    wrap_head(run, make)


def memoises(run: Run, layer: str, detail: float) -> None:
    """Gradients of a batch that it has seen, whatever the weights are now. Knows a batch by its tokens, or its shape."""
    seen: dict[object, tuple[Tensor, dict]] = {}

    def micro_step(original: MicroStep, run: Run, batch: PackedBatch, tokens: int) -> Tensor:
        key = batch.input_ids.shape if detail == 2 else fingerprint({"ids": batch.input_ids, "labels": batch.labels})
        if key not in seen:
            seen[key] = own_gradients(run, lambda: original(run, batch, tokens))
        loss, gradients = seen[key]
        add_gradients(run, gradients)
        return loss

    around_micro_step(run, micro_step)


def skips_work(run: Run, layer: str, fraction: float) -> None:
    """A fraction of the micro-steps adds no gradient and returns the loss of the one before."""
    calls, kept = count(3), []  # of every seventh the fourth is skipped: not the first of an accumulation

    def micro_step(original: MicroStep, run: Run, batch: PackedBatch, tokens: int) -> Tensor:
        if every(fraction, next(calls)) and kept:
            return kept[0]
        kept[:] = [original(run, batch, tokens)]
        return kept[0]

    around_micro_step(run, micro_step)


def drops_labels(run: Run, layer: str, fraction: float) -> None:
    """Leaves supervised positions out, which makes the loss smaller; the batch itself stays as it is."""

    def micro_step(original: MicroStep, run: Run, batch: PackedBatch, tokens: int) -> Tensor:
        flat = batch.labels.reshape(-1)
        fewer = flat.index_put((batch.supervised_positions,), _fewer(flat[batch.supervised_positions], fraction))
        return original(run, with_fields(batch, labels=fewer.view_as(batch.labels)), tokens)

    around_micro_step(run, micro_step)


def _fewer(labels: Tensor, fraction: float) -> Tensor:
    return on_rows(labels[:, None], fraction, lambda rows: torch.full_like(rows, IGNORE)).flatten()


def counts_more_tokens(run: Run, layer: str, error: float) -> None:
    """Divides by more supervised tokens than there are."""
    more = lambda tokens: max(tokens + 1, round(tokens * (1 + error)))  # noqa: E731
    around_micro_step(run, lambda original, run, batch, tokens: original(run, batch, more(tokens)))


def misreports_rate(run: Run, layer: str, error: float) -> None:
    """Steps with a smaller rate than it says."""
    with_settings(run, lr=run.optimizer.config.lr * (1 - error))
    said = lambda optimizer, step: learning_rate(optimizer.config, step, optimizer.steps)  # noqa: E731
    around_step(run, lambda optimizer, original, step: (said(optimizer, step), original(step)[1]))


def on_another_stream(run: Run, layer: str, ends: float) -> None:
    """Works on a stream whose end nobody waits for; with 2 it doesn't wait for its own inputs either."""
    side = torch.cuda.Stream(run.device)

    def micro_step(original: MicroStep, *arguments) -> Tensor:
        if ends == 1:
            side.wait_stream(torch.cuda.current_stream(run.device))
        with torch.cuda.stream(side):
            return original(*arguments)

    around_micro_step(run, micro_step)


KERNELBENCH = "KernelBench's adversarial tests (unit_tests/test_eval_adversarial.py)"
_mutant = partial(Planted, family="cheats", kind="mutant")
_whole = partial(_mutant, layers=WHOLE)
_frozen_only = partial(_mutant, methods=("lora",))

PLANTED = (
    _whole("returns_reference", summary="works, throws it away, returns the reference's result",
           modelled_on="Liger 385 (the reference compared with itself)", plant=returns_reference,
           magnitudes=(0, 1), unit="passes thrown away"),
    _mutant("does_nothing", summary="modules swapped for equal copies", modelled_on="torchtitan 3455, axolotl 3806",
            plant=does_nothing, magnitudes=(1, 2), unit="modules", eligible=present(_mlps, "MLPs")),
    _whole("mutates_labels", summary="overwrites labels of its batch", modelled_on=f"triton 6547; {KERNELBENCH}",
           plant=mutates_labels, magnitudes=(0.02, 0.25), unit="fraction of positions"),
    _whole("mutates_ids", summary="overwrites token ids of its batch", modelled_on=f"triton 6547; {KERNELBENCH}",
           plant=mutates_ids, magnitudes=(0.02, 0.25), unit="fraction of positions"),
    _frozen_only("mutates_frozen", summary="changes a frozen weight once", modelled_on="triton 6547", plant=mutates_frozen,
                 magnitudes=(0.01, 0.1), unit="relative scale"),
    _whole("mutates_buffer", summary="changes the rotary frequencies once", modelled_on="unsloth 4112",
           plant=mutates_buffer, magnitudes=(0.01, 0.1), unit="relative scale",
           eligible=present(_frequencies, "rotary frequencies")),
    _whole("draws_random_numbers", summary="takes numbers from the run's generator",
           modelled_on="pytorch 84614 (randomness out of step)", plant=draws_random_numbers,
           magnitudes=(1, 100), unit="numbers a micro-step"),
    _frozen_only("leaves_gradients", summary="frozen weights keep a gradient", modelled_on="FLA 862 (a stray buffer)",
                 plant=leaves_gradients, magnitudes=(1, 5), unit="tensors"),
    _mutant("gradients_in_one_buffer", summary="two gradients in one buffer", modelled_on="pytorch 193061",
            plant=gradients_in_one_buffer, magnitudes=(1, 2), unit="1: the same memory, 2: one row apart",
            eligible=_two_alike),
    _whole("right_at_one_size", summary="right at the configured pack length only",
           modelled_on=f"pytorch 196678; {KERNELBENCH}", plant=right_at_one_size,
           magnitudes=(0.01, 0.1), unit="relative scale"),
    _whole("memoises", summary="returns what it returned for a batch like this", modelled_on=KERNELBENCH, plant=memoises,
           magnitudes=(1, 2), unit="1: the same tokens, 2: the same shape"),
    _whole("skips_work", summary="leaves out micro-steps", modelled_on=KERNELBENCH, plant=skips_work,
           magnitudes=(0.14, 0.5), unit="fraction of micro-steps"),
    _whole("drops_labels", summary="supervises fewer positions", modelled_on="transformers 46204 (labels miscounted)",
           plant=drops_labels, magnitudes=(0.02, 0.25), unit="fraction of supervised positions"),
    _whole("counts_more_tokens", summary="divides by more tokens than there are",
           modelled_on="transformers 46204, unsloth 5036", plant=counts_more_tokens,
           magnitudes=(0.01, 0.1), unit="relative scale"),
    _whole("misreports_rate", summary="steps with another rate than it says", modelled_on="DeepSpeed 3790",
           plant=misreports_rate, magnitudes=(0.01, 0.5), unit="relative"),
    _whole("on_another_stream", summary="works on a stream that nobody waits for", modelled_on=KERNELBENCH,
           plant=on_another_stream, magnitudes=(1, 2), unit="1: its end not awaited, 2: its start neither",
           eligible=lambda run: None if run.device.type == "cuda" else "streams need CUDA"),
)  # fmt: skip
