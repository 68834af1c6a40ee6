"""Small runs with and without graphs, and how their micro-steps are compared. Graphs are `aten_tape`'s."""

from __future__ import annotations

import dataclasses

import torch
from aten_tape import TapeRecorder

from abtest.probes import TRICKY_LENGTHS, tricky_batch
from kernels.cuda_graphs.micro_step import GraphedMicroStep
from loop.batch import PackedBatch
from loop.config import Config, DataConfig, LoraConfig
from loop.data import Dataset
from loop.run import Run
from loop.training import build

LENGTH = 192
CONFIG = Config(
    steps=4, device="cpu", dtype="float32", grad_accum=2, repeatable_attention=True,
    lora=LoraConfig(rank=4, alpha=8.0), data=DataConfig(pack_length=256),
)  # fmt: skip


def made(model: str = "qwen3-shallow-tiny", graphed: bool = True, **changes) -> tuple[Run, Dataset]:
    run, dataset = build(dataclasses.replace(CONFIG, model=model, **changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in run.optimizer.parameters.items():
            if ".lora_B." in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    if graphed:
        run.micro_step = GraphedMicroStep(TapeRecorder())
    return run, dataset


def pack(run: Run, seed: int, rows: int = 1, lengths: tuple[int, ...] = TRICKY_LENGTHS) -> PackedBatch:
    return tricky_batch(LENGTH, rows, run.model.config.vocab_size, seed, lengths).to(run.device)


def outcome(run: Run, *batches: PackedBatch) -> list[torch.Tensor]:
    """Loss sums and gradients of one step's micro-batches; copies, which it doesn't leave behind."""
    run.optimizer.zero_grad()
    tokens = sum(batch.supervised_tokens for batch in batches)
    losses = [run.micro_step(run, batch, tokens) for batch in batches]
    found = losses + [gradient.clone() for gradient in run.optimizer.gradients().values() if gradient is not None]
    run.optimizer.zero_grad()
    return found


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Bit for bit, the sign of zero included."""
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs)
