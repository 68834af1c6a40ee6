"""The configuration of a training run: frozen dataclasses that are TOML recipes and command-line flags alike."""

from __future__ import annotations

from dataclasses import dataclass, field
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

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = DEFAULT_TARGETS
    backend: Literal["builtin", "peft"] = "builtin"  # whose module computes the adapters: ours, or PEFT's LoraLinear
    start_from: Path | None = None  # a folder saved by PEFT or by this loop


@dataclass(frozen=True)
class DataConfig:
    """Where examples come from and how they are packed. pack_length is in tokens."""

    # JSONL; None: chat examples made from the Python documentation
    path: Annotated[Path | None, tyro.conf.arg(aliases=["--data"])] = None
    pack_length: int = 512
    packs_per_micro_step: int = 1
    on_bad_example: Literal["stop", "skip"] = "stop"
    supervise: Literal["assistant", "all"] = "assistant"
    max_examples: int | None = None
    cache_dir: Path = Path(".cache/isoloss")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay to `min_lr_ratio` of `lr`; clip_norm 0 switches clipping off."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 3
    min_lr_ratio: float = 0.1
    clip_norm: float = 1.0


@dataclass(frozen=True)
class Config:
    """One training run. `model` is a folder or hub id of a transformers model, or a named shape with random weights."""

    model: str = "qwen3.5-tiny"
    method: Literal["lora", "full"] = "lora"
    steps: int = 30
    grad_accum: int = 1  # micro-steps a step
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of compute; what trains has an fp32 master copy
    gradient_checkpointing: bool = False
    output: Path | None = None  # where adapters or weights and the training state go; None: nowhere
    save_every: int = 1  # steps between checkpoints when `output` is set; a crash loses at most the steps in between
    resume: bool = False  # go on from the checkpoint in `output`
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
