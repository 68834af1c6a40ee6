"""The training loop: data, model, optimizations, steps."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from kernels import registry
from loop import checkpoint, lora
from loop.batch import PackedBatch
from loop.config import Config
from loop.data import Dataset, load_dataset, load_tokenizer
from loop.errors import UserError
from loop.model import checkpoint_folder, cross_entropy_head, load_model, plain_micro_step, resolve_device, trainable
from loop.optim import MasterAdamW
from loop.run import Run


class NonFiniteLoss(Exception):
    """The loss became NaN or infinite; the message names step, micro-step and batch."""


@dataclass(frozen=True)
class StepLog:
    """One optimizer step. loss is loss_sum / supervised_tokens; seconds is wall time; memory is the device's peak so far."""

    step: int
    loss: float
    loss_sum: float
    grad_norm: float
    lr: float
    positions: int
    real_tokens: int
    supervised_tokens: int
    seconds: float
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class RunLog:
    """What a training run did. `data` holds the data set's statistics, skipped examples among them."""

    steps: tuple[StepLog, ...]
    enabled: tuple[str, ...]
    refused: dict[str, str]
    data: dict[str, Any]
    save_seconds: float = 0.0
    interrupted: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def losses(self) -> tuple[float, ...]:
        return tuple(step.loss for step in self.steps)


OnStep = Callable[[StepLog], None]


def build(config: Config, enable: Iterable[str] = ()) -> tuple[Run, Dataset]:
    """A run ready for its first micro-step: data, model with adapters, optimizer, and what is enabled. Seeds torch."""
    validate(config)
    device, dtype = resolve_device(config)
    tokenizer = load_tokenizer(checkpoint_folder(config.model), config.data)
    dataset = load_dataset(config.data, tokenizer, config.seed)
    model = load_model(config, len(tokenizer))
    if config.method == "lora":
        lora.attach(model, config.lora, config.seed)
    optimizer = MasterAdamW(trainable(model), config.optim, config.steps)
    run = Run(config, device, dtype, model, cross_entropy_head, plain_micro_step, optimizer)
    switch_on(run, enable)
    return run, dataset


def switch_on(run: Run, names: Iterable[str]) -> None:
    """Enables optimizations on a built run, then seeds torch, so that whatever they drew changes nothing after."""
    registry.enable(run, names)
    torch.manual_seed(run.config.seed)


def validate(config: Config) -> None:
    """Raises UserError for numbers no run can have."""
    positive = {"steps": config.steps, "grad_accum": config.grad_accum, "save_every": config.save_every,
                "data.pack_length": config.data.pack_length, "optim.lr": config.optim.lr,
                "data.packs_per_micro_step": config.data.packs_per_micro_step}  # fmt: skip
    for name, value in positive.items():
        if not value > 0 or not math.isfinite(value):
            raise UserError(f"{name} is {value}; it must be positive")
    if config.data.pack_length < 2:
        raise UserError(f"data.pack_length is {config.data.pack_length}; a token needs a next one to predict, so at least 2")
    if not 0 <= config.lora.dropout < 1:
        raise UserError(f"lora.dropout is {config.lora.dropout}; it must be at least 0 and below 1")


def train(config: Config, enable: Iterable[str] = (), on_step: OnStep | None = None) -> RunLog:
    """Trains for `config.steps` steps with the named optimizations on; may be called again in the same process.

    Raises UserError for a wrong configuration or bad data, NonFiniteLoss when the loss stops being a number. Ctrl-C ends
    the run after saving the last finished step; the log then says `interrupted`.
    """
    checkpoint.start_output(config)
    run, dataset = build(config, enable)
    first = checkpoint.load_state(run, dataset.content_hash) if config.resume else 0
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    log, save_seconds, interrupted = [], 0.0, False
    try:
        for step in range(first, config.steps):
            log.append(train_step(run, dataset, step))
            if on_step is not None:
                on_step(log[-1])
            if config.output is not None:
                _append_log(config, log[-1])
                if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                    began = time.perf_counter()
                    checkpoint.save_state(run, step + 1, dataset.content_hash)
                    save_seconds += time.perf_counter() - began
    except KeyboardInterrupt:
        interrupted = True  # the step in flight is lost; every `save_every`-th finished one is on disk
    if config.output is not None and config.method == "full" and log:
        checkpoint.save_weights(run)
    return RunLog(tuple(log), tuple(run.enabled), dict(run.refused), dataset.statistics(), save_seconds, interrupted)


def train_step(run: Run, dataset: Dataset, step: int) -> StepLog:
    """One optimizer step over `grad_accum` micro-steps, normalised by the step's supervised tokens."""
    began = time.perf_counter()
    config = run.config
    batches = dataset.micro_batches(step, config.grad_accum, config.data.packs_per_micro_step)
    supervised = sum(batch.supervised_tokens for batch in batches)
    loss_sums = accumulate(run, batches, supervised)
    _check_finite(step, loss_sums)
    loss_sum = sum(loss_sums)
    lr, norm = run.optimizer.step(step)
    grad_norm = float(norm)
    if not math.isfinite(grad_norm):
        raise NonFiniteLoss(f"step {step}: the gradient norm is {grad_norm} although the loss is finite ({loss_sum})")
    cuda = run.device.type == "cuda"
    return StepLog(
        step=step,
        loss=loss_sum / max(supervised, 1),
        loss_sum=loss_sum,
        grad_norm=grad_norm,
        lr=lr,
        positions=sum(batch.positions for batch in batches),
        real_tokens=sum(batch.real_tokens for batch in batches),
        supervised_tokens=supervised,
        seconds=time.perf_counter() - began,
        peak_memory_bytes=torch.cuda.max_memory_allocated(run.device) if cuda else None,
    )


def accumulate(run: Run, batches: list[PackedBatch], supervised: int) -> list[float]:
    """Forward and backward of every micro-batch; returns their loss sums. One device synchronisation, at the end."""
    sums = [run.micro_step(run, batch.to(run.device), supervised) for batch in batches]
    return torch.stack(sums).double().tolist()


def _check_finite(step: int, loss_sums: list[float]) -> None:
    for index, value in enumerate(loss_sums):
        if not math.isfinite(value):
            raise NonFiniteLoss(
                f"step {step}, micro-step {index}: the loss is {value}; the batch is micro_batches(step={step})[{index}]"
            )


def _append_log(config: Config, step: StepLog) -> None:
    with (config.output / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(step)) + "\n")
