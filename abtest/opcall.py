"""Calls an op the way training does: forward, then backward from random incoming gradients."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def call(function: Callable[..., Any], inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    """The outputs of one side of an op, always as a tuple."""
    outputs = function(*inputs)
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def input_names(function: Callable[..., Any], inputs: Sequence[Any]) -> list[str]:
    """What `function` calls its inputs, or "input 0", ... where it takes another number of parameters."""
    names = list(inspect.signature(function).parameters)
    return names if len(names) == len(inputs) else [f"input {index}" for index in range(len(inputs))]


def tensors_in(name: str, item: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that one input holds: itself, a module's parameters and buffers, or the fields of a dataclass."""
    if isinstance(item, Tensor):
        yield name, item
    elif isinstance(item, nn.Module):
        held = (*item.named_parameters(), *item.named_buffers())
        yield from ((f"{name}.{key}", value) for key, value in held)
    elif dataclasses.is_dataclass(item) and not isinstance(item, type):
        for field in dataclasses.fields(item):
            yield from tensors_in(f"{name}.{field.name}", getattr(item, field.name))


def leaves(names: Sequence[str], inputs: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor whose gradient is compared: floating-point inputs and module parameters that require one."""
    for name, item in zip(names, inputs, strict=True):
        held = tensors_in(name, item)
        yield from ((key, value) for key, value in held if value.is_floating_point() and value.requires_grad)


def named_outputs(outputs: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"output {index}": output for index, output in enumerate(outputs)}


def random_gradients(outputs: Sequence[Tensor], seed: int) -> dict[str, Tensor]:
    """Normal incoming gradients for the outputs that can take one."""
    gradients = {}
    for index, (name, output) in enumerate(named_outputs(outputs).items()):
        if output.requires_grad:
            generator = torch.Generator(output.device).manual_seed(1000 * (seed + 1) + index)
            drawn = torch.randn(output.shape, generator=generator, device=output.device)
            gradients[name] = drawn.to(output.dtype)
    return gradients


def gradients_of(
    outputs: Sequence[Tensor], wanted: Mapping[str, Tensor], incoming: Mapping[str, Tensor], retain_graph: bool = False
) -> dict[str, Tensor | None]:
    """Gradients of the `wanted` leaves, by name; None where autograd delivers none. Writes no `.grad`."""
    ends = {name: out for name, out in named_outputs(outputs).items() if name in incoming and out.requires_grad}
    if not ends or not wanted:
        return dict.fromkeys(wanted)
    sent = [incoming[name] for name in ends]
    found = torch.autograd.grad(list(ends.values()), list(wanted.values()), sent, retain_graph, allow_unused=True)
    return dict(zip(wanted, found, strict=True))
