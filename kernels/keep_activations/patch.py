"""Turns recomputation off in the model's layers, and the gradient of the first one's input that it asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from loop.run import Run

# Bytes a position and layer keeps, over hidden size and element size: measured on Qwen3.5-2B, 16 GiB for 5376 positions and
# 24 layers of 2048 in bf16, is 33; rounded up for safety.
KEPT_PER_POSITION = 40


def eligible(run: Run) -> str | None:
    if not _checkpointed(run):
        return "the run recomputes nothing: gradient checkpointing is off"
    if run.device.type != "cuda":
        return None
    config, data = run.model.config, run.config.data
    positions = data.pack_length * data.packs_per_micro_step
    needed = KEPT_PER_POSITION * positions * config.num_hidden_layers * config.hidden_size * run.dtype.itemsize
    free = torch.cuda.mem_get_info(run.device)[0]
    if needed > free:
        return f"kept activations would take about {needed / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free"
    return None


def apply(run: Run) -> None:
    run.model.gradient_checkpointing_disable()
    run.model.disable_input_require_grads()  # a hook on the embeddings: frozen ones have no use for their output's gradient


def _checkpointed(run: Run) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in run.model.modules())
