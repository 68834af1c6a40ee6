"""A peer's model ready for a step: what it is fed, as a collator would, and its own loss."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from loop.batch import IGNORE, PackedBatch
from loop.config import Config
from loop.delta_net import Pack
from loop.model import checkpoint_folder
from loop.run import MicroStep, Run
from loop.shapes import SHAPES

Inputs = Callable[[PackedBatch], dict[str, Any]]


class Unavailable(Exception):
    """The peer has nothing for this model or this machine; the message says what it lacks, in one line."""


@dataclass(frozen=True)
class Ready:
    """A peer's model on its device, in training mode.

    model: the transformers model inside, whose parameters have the reference's names. called: what a step calls, the model
    or its wrapper. inputs(batch): its keyword arguments but for the number of targets. autocast: the dtype that a step's
    forward is cast to, None for none. took: the path that it takes, for the record. eager: whether its operators go through
    PyTorch's dispatcher one by one, so that they can be counted. observed: more of the path, asked after the first step.
    before_timing is called once the gate is done.
    """

    model: nn.Module
    called: nn.Module
    inputs: Inputs
    autocast: torch.dtype | None
    took: dict[str, Any] = field(default_factory=dict)
    eager: bool = True
    observed: Callable[[], dict[str, Any]] = dict
    before_timing: Callable[[], None] = lambda: None


def micro_step_of(ready: Ready) -> MicroStep:
    """Forward with the peer's own loss, and backward, as Trainer does it: the loss is the sum over targets divided by their
    number in the whole step."""

    def micro_step(run: Run, batch: PackedBatch, step_supervised_tokens: int) -> torch.Tensor:
        targets = max(step_supervised_tokens, 1)
        number = torch.full((), targets, device=run.device)
        with torch.autocast(run.device.type, ready.autocast, enabled=ready.autocast is not None):
            loss = ready.called(**ready.inputs(batch), num_items_in_batch=number).loss
        loss.backward()
        return loss.detach().float() * targets

    return micro_step


def raw_labels(labels: torch.Tensor) -> torch.Tensor:
    """labels [B, L], each the token that its position predicts -> [B, L], each position's own token, as data sets hold them
    and models shift them. The last position of a row never has a target, so nothing is lost."""
    return F.pad(labels[:, :-1], (1, 0), value=IGNORE)


def flattened(batch: PackedBatch, with_pack: bool = False) -> dict[str, Any]:
    """A micro-batch as transformers' DataCollatorWithFlattening makes it, all that it can return but what flash attention
    alone reads: input_ids, labels, position_ids [1, B * L], the boundaries, and the document of each position.

    with_pack: also what the loop's repeatable attention takes, which stands in for SDPA while the gate looks.
    """
    documents = batch.cu_seqlens.diff()
    numbers = torch.arange(len(documents), dtype=torch.int32, device=documents.device)
    return {
        "input_ids": batch.input_ids.reshape(1, -1),
        "labels": raw_labels(batch.labels.reshape(1, -1)),
        "position_ids": batch.position_ids.reshape(1, -1),
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
        "seq_idx": torch.repeat_interleave(numbers, documents, output_size=batch.positions)[None],
    } | ({"pack": Pack.of(batch)} if with_pack else {})


def one_text(batch: PackedBatch) -> dict[str, Any]:
    """Every pack as one text: input_ids and labels [B, L]."""
    return {"input_ids": batch.input_ids, "labels": raw_labels(batch.labels)}


def modelling_of(config: Config) -> ModuleType:
    """transformers' file of the run's model, imported now: what it binds at import, FLA say, is bound from here on."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    folder = checkpoint_folder(config.model)
    settings = AutoConfig.for_model(SHAPES[config.model][0]) if folder is None else AutoConfig.from_pretrained(folder)
    if type(settings) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Unavailable(f"transformers has no causal language model for the model type {settings.model_type}")
    return sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)].__module__]


def bound_kernels(modelling: ModuleType) -> dict[str, str]:
    """Which implementation transformers bound at import for each function that another package may serve, by dotted name."""
    found = {}
    for name, function in vars(modelling).items():
        if isinstance(function, FunctionType):
            own = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
            if {"implementation", "torch_function"} <= own.keys():
                bound = own["implementation"].cell_contents
                found[name] = f"{bound.__module__}.{getattr(bound, '__qualname__', type(bound).__qualname__)}"
    return found
