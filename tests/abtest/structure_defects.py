"""Defects of structure, each with the findings of check 5 that must name it: functions of a run, planted where an
optimization would be."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from leak_defects import gradient_across, label_across, one_boundary, step_leaks
from tiny import tricky
from torch import Tensor, nn

from abtest.catalogue import find
from abtest.catalogue.patching import (
    around_micro_step,
    bend_gradient,
    bend_output,
    named,
    pick,
    swap_optimizer,
    with_fields,
    wrap_head,
)
from abtest.fingerprint import batch_fingerprint
from loop.batch import PackedBatch
from loop.run import Run

PLAIN = torch.empty
INPUTS = "inputs unmodified"
STRAY = "no gradient on what does not train"
RANDOM = "a micro-step without dropout draws no random numbers"
AGAIN = "the same batch gives the same gradients after another one"
TOKENS = "other tokens give other gradients"
LABELS = "other labels give other gradients"
BOUNDARIES = "other boundaries give other gradients"
WEIGHTS = "other weights give other gradients"
FOLLOWS = "gradients follow weights that change"
REPEATS = "2 repeats have the same bits"
MEMORY = "nothing depends on uninitialised memory"
BACKWARD = "a second backward gives the same gradients"
LOSS_APART = "editing a document leaves the loss of the others unchanged"
GRADIENT_APART = "editing a document leaves the input gradient of the others unchanged"
STEP_APART = "editing documents outside the loss leaves the micro-step unchanged"
APART, BACKWARD_APART = (STEP_APART, LOSS_APART, GRADIENT_APART), (STEP_APART, GRADIENT_APART)
ALL = (
    INPUTS, STRAY, RANDOM, AGAIN, TOKENS, LABELS, BOUNDARIES, WEIGHTS, FOLLOWS, REPEATS, MEMORY, BACKWARD, LOSS_APART,
    GRADIENT_APART, STEP_APART,
)  # fmt: skip


def mutates_labels(run: Run) -> None:
    def change(original, run: Run, batch: PackedBatch, tokens: int) -> Tensor:
        loss = original(run, batch, tokens)
        batch.labels[0, 0] = 7
        return loss

    around_micro_step(run, change)


def _behind(run: Run, action: Callable[[Run], object]) -> None:
    """`action(run)` behind every micro-step."""

    def change(original, *arguments) -> Tensor:
        loss = original(*arguments)
        with torch.no_grad():
            action(run)
        return loss

    around_micro_step(run, change)


def mutates_frozen_weight(run: Run) -> None:
    _behind(run, lambda run: run.model.get_input_embeddings().weight[0].mul_(1.001))


def mutates_buffer(run: Run) -> None:
    _behind(run, lambda run: next(run.model.buffers()).mul_(1.001))


def exchanges_buffer(run: Run) -> None:
    """Nothing is written to: the buffer is another tensor from then on."""
    rotary = next(module for module in run.model.modules() if "inv_freq" in module._buffers)

    def exchange(run: Run) -> None:
        rotary.inv_freq = rotary.inv_freq * 1.001

    _behind(run, exchange)


def mutates_moments(run: Run) -> None:
    run.micro_step(run, tricky(run, 0), 50)
    run.optimizer.step(0)
    state = next(iter(run.optimizer.adamw.state.values()))
    _behind(run, lambda run: state["exp_avg"].mul_(0.5))


def drops_state(run: Run) -> None:
    class Dropping(type(run.optimizer)):
        def state(self):
            return {name: value for name, value in super().state().items() if not name.endswith(self.hidden)}

    swap_optimizer(run, lambda kind: Dropping)
    run.optimizer.hidden = ("none of them",)
    _behind(run, lambda run: setattr(run.optimizer, "hidden", next(iter(run.optimizer.masters))))


def trains_frozen(run: Run) -> None:
    weight = run.model.get_decoder().norm.weight

    def action(run: Run) -> None:
        weight.grad = torch.ones_like(weight)

    _behind(run, action)


def draws_random_numbers(run: Run) -> None:
    _behind(run, lambda run: torch.rand(1))


def cached_batch(run: Run) -> None:
    kept: list[PackedBatch] = []

    def change(original, run: Run, batch: PackedBatch, tokens: int) -> Tensor:
        kept.append(batch)
        return original(run, kept[0], tokens)

    around_micro_step(run, change)


def stale_labels(run: Run) -> None:
    """The labels of the first batch with the same tokens, as from a cache by tokens."""
    kept: dict[int, Tensor] = {}

    def make(original):
        def head(model: nn.Module, hidden: Tensor, batch: PackedBatch) -> Tensor:
            labels = kept.setdefault(int(batch.input_ids.sum()), batch.labels.clone())
            return original(model, hidden, with_fields(batch, labels=labels))

        return head

    wrap_head(run, make)


def stale_boundaries(run: Run) -> None:
    """Boundaries by the number of positions, as from a cache of metadata by shape."""
    kept: dict[torch.Size, PackedBatch] = {}

    def change(original, run: Run, batch: PackedBatch, tokens: int) -> Tensor:
        first = kept.setdefault(batch.input_ids.shape, batch)
        fields = {"cu_seqlens": first.cu_seqlens, "position_ids": first.position_ids, "lengths": first.lengths}
        return original(run, with_fields(batch, **fields), tokens)

    around_micro_step(run, change)


def gradients_by_batch(run: Run) -> None:
    """A batch that was seen gets the gradients that it had then."""
    known: dict[str, tuple[Tensor, list[Tensor]]] = {}

    def change(original, run: Run, batch: PackedBatch, tokens: int) -> Tensor:
        key = f"{batch_fingerprint([batch])} {tokens}"
        if key not in known:
            loss = original(run, batch, tokens)
            known[key] = loss, [g.clone() for g in run.optimizer.gradients().values()]
            return loss
        loss, gradients = known[key]
        torch.autograd.backward(list(run.optimizer.parameters.values()), gradients)
        return loss

    around_micro_step(run, change)


def stateful(run: Run) -> None:
    """Something adds up from call to call: an amax, a scale, a step count that is never reset."""
    calls = itertools.count()

    def make(original):
        return lambda *inputs: original(*inputs) * (1 + 1e-3 * next(calls))

    wrap_head(run, make)


def noise(run: Run) -> None:
    """A stand-in for atomics: last bits that change from call to call, drawn outside of torch's generators."""
    generator = torch.Generator().manual_seed(0)

    def add(out: Tensor, *inputs: Tensor) -> Tensor:
        return out * (1 + 2**-22 * torch.randint(-1, 2, out.shape, generator=generator))

    bend_output(run.model, pick(named(run.model, ".mlp"), "last"), add)


def unwritten_row(run: Run) -> None:
    """One row of a gradient comes from `torch.empty`; that page happened to hold zeros, which is what a test sees."""

    def change(gradient: Tensor) -> Tensor:
        out = torch.empty(gradient.shape)
        out[..., 1:, :] = gradient[..., 1:, :]
        return out if torch.empty is not PLAIN else out.index_fill(-2, torch.zeros(1, dtype=torch.int64), 0.0)

    bend_output(run.model, pick(named(run.model, ".mlp"), "last"), lambda out, *inputs: bend_gradient(out, change))


class _InPlace(torch.autograd.Function):
    """Its gradient is made forward, as fused losses do, and scaled in place when it is asked for."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.gradient = 2 * x
        return x.square().sum()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return ctx.gradient.mul_(gradient)


def scales_in_place(run: Run) -> None:
    def make(original):
        return lambda model, hidden, batch: original(model, hidden, batch) + 1e-3 * _InPlace.apply(hidden)

    wrap_head(run, make)


class _Clobbered(torch.autograd.Function):
    """Saves a buffer and uses it up."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.saved = torch.full_like(x, 1.0)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved.mul_(0.999)


def clobbers_saved(run: Run) -> None:
    bend_output(run.model, pick(named(run.model, ".mlp"), "first"), lambda out, *inputs: _Clobbered.apply(out))


@dataclass(frozen=True)
class Defect:
    """`fails`: what it must fail, and nothing else where `alone`. model: one with delta layers where the defect is in them;
    a micro-step of it takes three times as long."""

    plant: Callable[[Run], None]
    fails: tuple[str, ...]
    alone: bool = True
    model: str = "qwen3-shallow-tiny"
    detail: str = ""


DEFECTS = {
    "labels mutated": Defect(mutates_labels, (INPUTS,), alone=False, detail="the batch: labels"),
    "frozen weight mutated": Defect(mutates_frozen_weight, (INPUTS,), alone=False, detail="the model: model.embed_tokens"),
    "buffer mutated": Defect(mutates_buffer, (INPUTS,), alone=False, detail="the model: model.rotary_emb"),
    "buffer exchanged": Defect(exchanges_buffer, (INPUTS,), alone=False, detail="the model: model.rotary_emb.inv_freq"),
    "moments mutated": Defect(mutates_moments, (INPUTS,), detail="the optimizer: exp_avg"),
    "optimizer state dropped": Defect(drops_state, (INPUTS,), detail="the optimizer: master."),
    "gradient on a frozen weight": Defect(trains_frozen, (STRAY,), detail="model.norm.weight"),
    "random numbers drawn": Defect(draws_random_numbers, (RANDOM,)),
    "batch cached": Defect(cached_batch, (TOKENS, LABELS, BOUNDARIES)),
    "labels stale": Defect(stale_labels, (LABELS,), alone=False),
    "boundaries stale": Defect(stale_boundaries, (BOUNDARIES,)),
    "gradients kept by batch": Defect(gradients_by_batch, (WEIGHTS,)),
    "a weight copied now and then": Defect(find("lora_db_from_stale_a:first:4").apply, (FOLLOWS,), detail="late with the"),
    "a state kept": Defect(stateful, (AGAIN, REPEATS), alone=False),
    "noise": Defect(noise, (AGAIN, REPEATS), alone=False, detail="differ"),
    "row unwritten": Defect(unwritten_row, (MEMORY,), detail="nan, 10000"),
    "scaled in place": Defect(scales_in_place, (BACKWARD,), alone=False),
    "saved tensor clobbered": Defect(clobbers_saved, (BACKWARD,)),
    "delta-rule state leaks": Defect(find("state_leak:first:1").apply, APART, model="qwen3.5-shallow-tiny"),
    "convolution leaks": Defect(find("conv_leak:last:1").apply, APART, model="qwen3.5-shallow-tiny"),
    "convolution leaks at boundary 2": Defect(one_boundary(2), APART, model="qwen3.5-shallow-tiny"),
    "convolution leaks at boundary 3": Defect(one_boundary(3), APART, model="qwen3.5-shallow-tiny"),
    "attention leaks": Defect(find("attention_leak:last:1").apply, APART),
    "attention leaks in a window": Defect(find("attention_leak:first:1").apply, APART, model="mistral-tiny"),
    "state leaks backward alone": Defect(
        find("backward_state_leak:first:1").apply, BACKWARD_APART, detail="position ", model="qwen3.5-shallow-tiny"
    ),
    "gradient leaks": Defect(gradient_across, BACKWARD_APART, detail="position "),
    "a leak in the micro-step alone": Defect(step_leaks, (STEP_APART,), detail="odd and even"),
    "label of the next document": Defect(label_across, APART),
}
