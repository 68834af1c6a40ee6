"""The training loop: data, model, optimizations, steps."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch

from kernels import registry
from loop import checkpoint, lora
from loop.batch import PackedBatch
from loop.config import Config
from loop.data import Dataset, load_dataset, load_tokenizer
from loop.errors import UserError
from loop.files import write_text
from loop.interrupt import deferred_interrupt
from loop.model import checkpoint_folder, cross_entropy_head, load_model, plain_micro_step, resolve_device, trainable
from loop.optim import MasterAdamW
from loop.rows import padded_micro_step, positions_of
from loop.run import Run

LOG_FILE = "log.jsonl"  # in the output folder: one StepLog a line


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
OnStart = Callable[[Run], None]


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
    if config.method == "lora" and config.lora.start_from is not None:
        lora.load_adapters(model, config.lora.start_from, optimizer.masters)
        optimizer.publish()
    micro_step = padded_micro_step if config.data.rows == "padded" else plain_micro_step
    run = Run(config, device, dtype, model, cross_entropy_head, micro_step, optimizer)
    switch_on(run, enable)
    return run, dataset


def switch_on(run: Run, names: Iterable[str]) -> None:
    """Enables optimizations on a built run, then seeds torch, so that whatever they drew changes nothing after."""
    registry.enable(run, names)
    torch.manual_seed(run.config.seed)


# What a number must be, in words and as a test that NaN fails, and the keys it holds for.
RANGES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    ("positive", lambda value: 0 < value < math.inf,
     ("steps", "grad_accum", "save_every", "data.packs_per_micro_step", "optim.lr", "lora.rank", "lora.alpha")),
    ("0 or more", lambda value: 0 <= value < math.inf,
     ("optim.eps", "optim.weight_decay", "optim.warmup_steps", "optim.clip_norm")),
    ("at least 0 and below 1", lambda value: 0 <= value < 1, ("lora.dropout", "optim.beta1", "optim.beta2")),
    ("between 0 and 1", lambda value: 0 <= value <= 1, ("optim.min_lr_ratio",)),
    ("at least 0 and below 2**63", lambda value: 0 <= value < 2**63, ("seed",)),
    ("at least 2, since a token needs a next one to predict", lambda value: value >= 2, ("data.pack_length",)),
)  # fmt: skip


def validate(config: Config) -> None:
    """Raises UserError for numbers no run can have."""
    for words, fits, keys in RANGES:
        for key in keys:
            value = attrgetter(key)(config)
            if not fits(value):
                raise UserError(f"{key} is {value}; it must be {words}")


def train(
    config: Config, enable: Iterable[str] = (), on_step: OnStep | None = None, on_start: OnStart | None = None
) -> RunLog:
    """Trains for `config.steps` steps with the named optimizations on; may be called again in the same process.

    `on_start` is called once everything is loaded and switched on, `on_step` after every step.
    Raises UserError for a wrong configuration or bad data, NonFiniteLoss when the loss stops being a number. Ctrl-C ends
    the run once the step is finished and saved; the log then says `interrupted`. A second Ctrl-C, or a KeyboardInterrupt
    from `on_step`, ends it at once, with what `save_every` has left on disk.
    """
    checkpoint.start_output(config)
    run, dataset = build(config, enable)
    first = checkpoint.load_state(run, dataset.content_hash) if config.resume else 0
    if config.resume:
        _trim_log(config, first)
    if on_start is not None:
        on_start(run)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    log, save_seconds, interrupted, between_steps = [], 0.0, False, True
    try:
        with deferred_interrupt() as asked_to_stop:
            for step in range(first, config.steps):
                between_steps = False
                log.append(train_step(run, dataset, step))
                if on_step is not None:
                    on_step(log[-1])
                last = step + 1 == config.steps
                interrupted = asked_to_stop() and not last
                if config.output is not None:
                    _append_log(config, log[-1])
                    if (step + 1) % config.save_every == 0 or last or interrupted:
                        began = time.perf_counter()
                        checkpoint.save_state(run, step + 1, dataset.content_hash)
                        save_seconds += time.perf_counter() - began
                between_steps = True
                if interrupted:
                    break
    except KeyboardInterrupt:
        interrupted = True
    if config.output is not None and config.method == "full" and log and between_steps:  # within one, weights are torn
        checkpoint.save_weights(run)
    return RunLog(tuple(log), tuple(run.enabled), dict(run.refused), dataset.statistics(), save_seconds, interrupted)


def train_step(run: Run, dataset: Dataset, step: int) -> StepLog:
    """One optimizer step over `grad_accum` micro-steps, normalised by the step's supervised tokens.

    The update is asked for before losses and norm are read: the host waits for the device once, when there is nothing left
    to launch. Where one of them is no number, the update was made of it; what is raised says so before anything is saved.
    """
    began = time.perf_counter()
    config = run.config
    batches = dataset.micro_batches(step, config.grad_accum, config.data.packs_per_micro_step)
    supervised = sum(batch.supervised_tokens for batch in batches)
    sums = micro_steps(run, batches, supervised)
    lr, norm = run.optimizer.step(step)
    loss_sums, grad_norm = sums.tolist(), float(norm)
    _check_finite(step, loss_sums)
    loss_sum = sum(loss_sums)
    if not math.isfinite(grad_norm):
        raise NonFiniteLoss(
            f"step {step}: the gradient norm is {grad_norm} although the loss is finite ({loss_sum}); "
            f"the batches are micro_batches(step={step})"
        )
    cuda = run.device.type == "cuda"
    return StepLog(
        step=step,
        loss=loss_sum / max(supervised, 1),
        loss_sum=loss_sum,
        grad_norm=grad_norm,
        lr=lr,
        positions=sum(positions_of(run, batch) for batch in batches),
        real_tokens=sum(batch.real_tokens for batch in batches),
        supervised_tokens=supervised,
        seconds=time.perf_counter() - began,
        peak_memory_bytes=torch.cuda.max_memory_allocated(run.device) if cuda else None,
    )


def accumulate(run: Run, batches: list[PackedBatch], supervised: int) -> list[float]:
    """Forward and backward of every micro-batch; returns their loss sums. One device synchronisation, at the end."""
    return micro_steps(run, batches, supervised).tolist()


def micro_steps(run: Run, batches: list[PackedBatch], supervised: int) -> torch.Tensor:
    """The same without a synchronisation: fp64 loss sums [micro-batches] on the device."""
    return torch.stack([run.micro_step(run, batch.to(run.device), supervised) for batch in batches]).double()


def _check_finite(step: int, loss_sums: list[float]) -> None:
    for index, value in enumerate(loss_sums):
        if not math.isfinite(value):
            raise NonFiniteLoss(
                f"step {step}, micro-step {index}: the loss is {value}; the batch is micro_batches(step={step})[{index}]"
            )


def _append_log(config: Config, step: StepLog) -> None:
    with (config.output / LOG_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(step)) + "\n")


def _trim_log(config: Config, next_step: int) -> None:
    """Drops the lines of steps that came after the checkpoint, and so will come again, and one that was cut off."""
    path, kept = config.output / LOG_FILE, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            if json.loads(line)["step"] < next_step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_text(path, "".join(kept))
