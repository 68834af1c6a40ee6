"""A planted defect as the candidate of an op: the module, loss head or accumulation that it changes, beside the same whole.

What a defect exchanges is found by planting it, so nothing here knows any of them by name. A module is given what it gets in
a real forward of a small model, and random incoming gradients; `abtest.opcheck` judges it beside fp64.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from tiny import CONFIG, LENGTH, duplicate, tiny
from torch import Tensor, nn

from abtest.catalogue import Case
from abtest.catalogue.patching import with_fields
from abtest.opcheck import OpReport, check_op
from abtest.oracle import ExactGradients
from abtest.probes import tricky_batch
from abtest.tripwire import exchanged, parts
from abtest.uneven import SPREAD, uneven
from kernels.contract import Op, Workload
from loop.batch import IGNORE, PackedBatch
from loop.lora import adapters
from loop.model import cross_entropy_head, forward_body, plain_micro_step, trainable
from loop.optim import MasterAdamW
from loop.run import Run

CPU = torch.device("cpu")
CONFIDENT = (8.0, 16.0)  # times the hidden states: p of the best class then begins at 0.1, or at 0.8
MICRO_STEPS = 6
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def changed_part(case: Case, dtype: str) -> str:
    """What `case` exchanges in a run of "float32" or "bfloat16": the name of a module, "run.loss_head" or "run.micro_step".

    Raises ValueError for a case that changes something else, or more than one part, or has no effect in this dtype.
    """
    model = sharing(model_of(case.planted.methods[-1], dtype))
    run = run_around(model, getattr(torch, dtype))
    run.optimizer = MasterAdamW(trainable(model), CONFIG.optim, CONFIG.steps)
    before = parts(run)
    try:
        refusal = case.planted.eligible(run)
        if refusal is not None:
            raise ValueError(f"{case.id}: {refusal}")
        case.apply(run)
        changed = exchanged(before, run)
    finally:
        run.optimizer.release()
    if len(changed) != 1 or changed[0] == "run.optimizer":
        raise ValueError(f"{case.id} changes {', '.join(changed)}: not one module, the loss head or a micro-step")
    return changed[0]


def check_planted(case: Case, dtype: str, seed: int = 0) -> OpReport:
    """The op level's verdict on the part that `case` changes."""
    part, method = changed_part(case, dtype), case.planted.methods[-1]
    return _checked(part, method, dtype, seed, case)


def check_without(case: Case, dtype: str) -> OpReport:
    """The same without the defect: one verdict for all cases that change this part."""
    return _whole(changed_part(case, dtype), case.planted.methods[-1], dtype)


@functools.cache
def _whole(part: str, method: str, dtype: str) -> OpReport:
    return _checked(part, method, dtype, 0, None)


def _checked(part: str, method: str, dtype: str, seed: int, case: Case | None) -> OpReport:
    make = {"run.loss_head": head, "run.micro_step": accumulation}.get(part, module)
    return check_op(make(method, dtype, case, part), Workload(f"{part}, {method}", {}, dtype), CPU, seed)


def planted_op(case: Case | None, call: Callable[..., Any], inputs: Callable[..., tuple[Any, ...]]) -> Op:
    """`call(run, case, *tensors)` on the inputs (model, *tensors); only the candidate's is told of the case."""

    def side(case: Case | None) -> Callable[..., Any]:
        def function(model: nn.Module, *tensors: Tensor) -> Any:
            return call(run_around(sharing(model), tensors[0].dtype), case, *tensors)

        return function

    return Op(side(None), side(case), inputs, (), lambda workload: 0, lambda workload: 0)


# The three kinds of part


def module(method: str, dtype: str, case: Case | None, name: str) -> Op:
    """The module `name`. Its leaves are its floating-point positional inputs, or hidden_states, and what trains in it.

    Rotary tables are made inside, so that their rounding belongs to what is judged.
    """
    calls = calls_of(method, dtype)
    (positional, options), ((_, positions), _) = calls[name], calls["model.rotary_emb"]
    given = (*positional, *([options["hidden_states"]] if "hidden_states" in options else []))
    others = {key: value for key, value in options.items() if key != "hidden_states"}
    assert all(isinstance(tensor, Tensor) and tensor.is_floating_point() for tensor in given)

    def call(run: Run, case: Case | None, *tensors: Tensor) -> Any:
        if case is not None:
            case.apply(run)
        if "position_embeddings" in others:
            tables = run.model.get_decoder().rotary_emb(tensors[0], positions)
            return run.model.get_submodule(name)(*tensors, **others | {"position_embeddings": tables})
        return run.model.get_submodule(name)(*tensors, **others)

    def first(*inputs: Any) -> Any:
        out = call(*inputs)
        return out[0] if isinstance(out, tuple) else out  # attention also returns weights that nobody asked for

    def inputs(workload: Workload, device: torch.device, seed: int) -> tuple[Any, ...]:
        return duplicate(model_of(method, dtype)), *(tensor.clone().requires_grad_() for tensor in given)

    return planted_op(case, first, inputs)


def head(method: str, dtype: str, case: Case | None, name: str) -> Op:
    """The loss head where the model is right and fairly sure, and where it is almost certain: a loss for each."""
    (hidden,), _ = calls_of(method, dtype)["lm_head"]
    given, batch = [times * hidden for times in CONFIDENT], batch_of(method, dtype)
    with torch.no_grad():
        best = model_of(method, dtype).get_output_embeddings()(hidden).argmax(-1)
    batch = with_fields(batch, labels=torch.where(batch.labels == IGNORE, batch.labels, best))

    def call(run: Run, case: Case | None, *hidden: Tensor) -> tuple[Tensor, ...]:
        if case is not None:
            case.apply(run)
        return tuple(run.loss_head(run.model, own, batch) for own in hidden)

    def inputs(workload: Workload, device: torch.device, seed: int) -> tuple[Any, ...]:
        return duplicate(model_of(method, dtype)), *(tensor.clone().requires_grad_() for tensor in given)

    return planted_op(case, call, inputs)


def accumulation(method: str, dtype: str, case: Case | None, name: str) -> Op:
    """Several micro-steps, whose gradients are given [micro-steps, elements]: the outputs are what has been accumulated."""
    shapes = {name: p.shape for name, p in trainable(model_of(method, dtype)).items()}
    total = sum(shape.numel() for shape in shapes.values())

    def side(case: Case | None) -> Callable[[Tensor], tuple[Tensor, ...]]:
        def accumulated(given: Tensor) -> tuple[Tensor, ...]:
            run = run_around(duplicate(model_of(method, dtype)).to(given.dtype), given.dtype)
            parameters, rows = trainable(run.model), iter(given)
            if given.dtype != torch.float64:
                run.optimizer = MasterAdamW(parameters, CONFIG.optim, CONFIG.steps)

            def micro_step(run: Run, batch: PackedBatch, tokens: int) -> Tensor:
                shares = next(rows).split([shape.numel() for shape in shapes.values()])
                loss = sum((p * share.view_as(p)).sum() for p, share in zip(parameters.values(), shares, strict=True))
                (loss / tokens).backward()
                return loss.detach()

            run.micro_step = micro_step
            if case is not None:
                case.apply(run)
            batch = batch_of(method, dtype)
            for _ in given:
                run.micro_step(run, batch, MICRO_STEPS * batch.supervised_tokens)
            return tuple(run.optimizer.gradients().values())

        return accumulated

    @functools.cache
    def drawn(seed: int) -> Tensor:
        return torch.randn(MICRO_STEPS, total, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))

    def inputs(workload: Workload, device: torch.device, seed: int) -> tuple[Tensor]:
        return (drawn(seed).clone(),)

    return Op(side(None), side(case), inputs, (), lambda workload: 0, lambda workload: 0)


# What they work on


def run_around(model: nn.Module, dtype: torch.dtype) -> Run:
    """A run with stock seams, whose gradients stay what backward makes them."""
    config = dataclasses.replace(CONFIG, method="lora" if any(adapters(model)) else "full")
    return Run(config, CPU, dtype, model, cross_entropy_head, plain_micro_step, ExactGradients(trainable(model)))


def sharing(model: nn.Module) -> nn.Module:
    """Modules of its own, to plant in, around the same parameters and buffers."""
    return duplicate(model, (*model.parameters(), *model.buffers()))


@functools.cache
def model_of(method: str, dtype: str) -> nn.Module:
    """With vectors as a trained model has them: norms of ones and biases that are all the same hide a defect in them."""
    run, _ = tiny("qwen3.5-tiny", method=method, dtype=dtype)
    run.optimizer.release()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in run.model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(uneven(parameter, SPREAD, generator))
    return run.model


@functools.cache
def batch_of(method: str, dtype: str) -> PackedBatch:
    """A row of many documents; 192 positions, so that L % 128 == 64."""
    return tricky_batch(LENGTH, 1, model_of(method, dtype).config.vocab_size, 1)


@functools.cache
def calls_of(method: str, dtype: str) -> dict[str, Arguments]:
    """What every module is called with in one forward, by name."""
    model, found = model_of(method, dtype), {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, positional: tuple[Any, ...], options: dict[str, Any]) -> None:
            found[name] = _detached(positional), {key: _detached(value) for key, value in options.items()}

        return hook

    handles = [m.register_forward_pre_hook(keep(name), with_kwargs=True) for name, m in model.named_modules() if name]
    try:
        batch = batch_of(method, dtype)
        cross_entropy_head(model, forward_body(model, batch), batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    return type(value)(_detached(item) for item in value) if isinstance(value, (tuple, list)) else value
