"""Small runs to try the gate's parts on, each built anew in a tenth of a second."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from abtest.probes import Probe, tricky_batch
from loop.batch import PackedBatch
from loop.config import Config, DataConfig, LoraConfig
from loop.data import Dataset
from loop.lora import adapters
from loop.run import Run
from loop.training import build

LENGTH = 192
ATOMS = (bool, float, int, str, type(None))
CONFIG = Config(
    model="qwen3.5-shallow-tiny",
    steps=4,
    device="cpu",
    dtype="float32",
    grad_accum=2,
    repeatable_attention=True,
    lora=LoraConfig(rank=4, alpha=8.0),
    data=DataConfig(pack_length=LENGTH),
)


def tiny(model: str = "qwen3.5-shallow-tiny", method: str = "lora", **changes: Any) -> tuple[Run, Dataset]:
    """A run whose adapters add something and whose every other delta head forgets slowly, so that defects show."""
    run, dataset = build(dataclasses.replace(CONFIG, model=model, method=method, **changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for adapter in adapters(run.model):
            adapter.b.copy_(0.02 * torch.randn(adapter.b.shape, generator=generator))
        for name, parameter in run.model.named_parameters():
            if name.endswith("A_log"):
                parameter[::2] = math.log(0.05)
    return run, dataset


def duplicate(model: nn.Module, kept: Iterable[Tensor] = ()) -> nn.Module:
    """A deep copy that shares `kept` and the configuration, which nothing writes to. copy.deepcopy takes four times as long:
    of the fifty attributes of a module almost all are numbers, or dictionaries for hooks that are empty."""
    known: dict[int, Any] = {id(thing): thing for thing in (*kept, model.config)}
    modules = list(model.modules())
    known |= {id(module): object.__new__(type(module)) for module in modules}
    for module in modules:
        own = vars(known[id(module)])
        for name, value in vars(module).items():
            if isinstance(value, ATOMS):
                own[name] = value
            elif isinstance(value, (dict, set)) and not value:
                own[name] = type(value)()
            else:
                own[name] = copy.deepcopy(value, known)
    return known[id(model)]


def tricky(run: Run, seed: int, rows: int = 1) -> PackedBatch:
    return tricky_batch(LENGTH // 2, rows, run.model.config.vocab_size, seed)


def two_probes(run: Run) -> list[Probe]:
    """Two rows, and one: many documents, and other tokens in each."""
    return [(tricky(run, 1, rows=2),), (tricky(run, 2),)]


def gradients(run: Run, batch: PackedBatch) -> dict[str, Tensor]:
    """Copies of what one micro-step accumulates, which it doesn't leave behind."""
    run.optimizer.zero_grad()
    run.micro_step(run, batch, batch.supervised_tokens)
    found = {name: gradient.clone() for name, gradient in run.optimizer.gradients().items() if gradient is not None}
    run.optimizer.zero_grad()
    return found
