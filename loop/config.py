"""The configuration of a training run: frozen dataclasses that are TOML recipes and command-line flags alike."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

# The ten projections that carry adapters by default; a model that lacks some of them uses the rest.
DEFAULT_TARGETS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "in_proj_qkv", "in_proj_z", "out_proj",
)  # fmt: skip


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters. rank, alpha and dropout are PEFT's `r`, `lora_alpha` and `lora_dropout`."""

    rank: int = 16  # width of the adapters
    alpha: float = 32.0  # the adapter's output is scaled by alpha / rank
    dropout: float = 0.0  # probability with which an adapter's input is zeroed in training
    targets: tuple[str, ...] = DEFAULT_TARGETS  # projections with an adapter, by the last part of their name
    start_from: Path | None = None  # a folder saved by PEFT or by this loop


@dataclass(frozen=True)
class DataConfig:
    """Where examples come from and how they are packed. pack_length is in tokens."""

    path: Annotated[Path | None, tyro.conf.arg(aliases=["--data"])] = None  # JSONL; None: made from Python's documentation
    pack_length: int = 512  # tokens of a pack; a longer example is a bad one
    packs_per_micro_step: int = 1  # rows of a micro-batch
    rows: Literal["packed", "padded"] = "packed"  # what stock runs: the packs, or their documents one a row, padded
    fill: Literal["longest_first", "shuffled"] = "longest_first"  # fewest packs, of like lengths; or of mixed ones
    on_bad_example: Literal["stop", "skip"] = "stop"  # stop and name the line, or leave it out and count it
    supervise: Literal["assistant", "all"] = "assistant"  # the tokens with a loss: the assistant's, or every one
    max_examples: int | None = None  # read no more than this many; None: all
    cache_dir: Path = Path(".cache/isoloss")  # tokenised data and the default tokenizer


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay to `min_lr_ratio` of `lr`; clip_norm 0 switches clipping off."""

    lr: float = 1e-3  # the highest learning rate, reached after warm-up
    beta1: float = 0.9  # decay of the mean of gradients
    beta2: float = 0.999  # decay of the mean of squared gradients
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.01  # decoupled: a step shrinks every matrix by lr times this
    warmup_steps: int = 3  # steps in which the learning rate rises linearly
    min_lr_ratio: float = 0.1  # the last step's learning rate, as a part of lr
    clip_norm: float = 1.0  # largest norm of all gradients together; 0: no clipping


@dataclass(frozen=True)
class Config:
    """One training run. `model` is a folder or hub id of a transformers model, or a named shape with random weights."""

    model: str = "qwen3.5-tiny"  # a folder, a hub id, or a named shape with random weights
    method: Literal["lora", "full"] = "lora"  # train adapters, or every weight
    steps: int = 30  # optimizer steps
    grad_accum: int = 1  # micro-steps a step
    seed: int = 0  # of weights, adapters, the order of packs and dropout
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of compute; what trains has an fp32 master copy
    gradient_checkpointing: bool = False  # keep less memory, and run every layer's forward twice
    repeatable_attention: bool = False  # CUDA: attention whose backward repeats itself bitwise; the gate needs it, slower
    output: Path | None = None  # where adapters or weights and the training state go; None: nowhere
    save_every: int = 1  # steps between checkpoints when `output` is set; a crash loses at most the steps in between
    resume: bool = False  # go on from the checkpoint in `output`
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


def config_of(command: Config) -> Config:
    """The configuration within a command's flags, without those that the command adds."""
    return Config(**{f.name: getattr(command, f.name) for f in fields(Config)})
