"""Compiles every gated SiLU MLP with torch.compile(mode="max-autotune"): Triton's matmuls tried, CUDA graphs replayed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kernels.silu_mul.patch import gated_mlps
from loop.batch import PackedBatch
from loop.run import MicroStep, Run

# Recomputation keeps alive what died while a graph was recorded: "graph recording observed an input tensor deallocate".
ISSUE = "https://github.com/pytorch/pytorch/issues/154306"
OPTIONS = {"mode": "max-autotune", "dynamic": False}  # packs have one length


class CompiledMLP(nn.Module):
    """down_proj(act_fn(gate_proj(x)) * up_proj(x)) for x [..., D], on the submodules of the MLP that it replaces, compiled.

    `options` are torch.compile's. Names and parameters are those of the MLP; compilation happens at the first call.
    """

    def __init__(self, mlp: nn.Module, **options: Any):
        super().__init__()
        for name, child in mlp.named_children():
            self.add_module(name, child)
        self.training = mlp.training
        self.compile(**options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def announced(micro_step: MicroStep) -> MicroStep:
    """`micro_step`, which first tells inductor's CUDA graphs that the memory of the last one's results may be used again."""

    def announced_micro_step(run: Run, batch: PackedBatch, step_supervised_tokens: int) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return micro_step(run, batch, step_supervised_tokens)

    return announced_micro_step


def eligible(run: Run) -> str | None:
    """None, or why not: no CUDA graphs, recomputation, or nothing to compile."""
    if run.device.type != "cuda":
        return f"max-autotune is CUDA graphs and Triton's matmuls; this run is on {run.device.type}"
    if getattr(run.model, "is_gradient_checkpointing", False):
        return f"inductor's CUDA graphs break off where layers are recomputed ({ISSUE}); switch gradient_checkpointing off"
    if not gated_mlps(run.model):
        return f"{type(run.model).__name__} has no MLP of the form down_proj(silu(gate_proj(x)) * up_proj(x))"
    return None


def apply(run: Run) -> None:
    """Replaces every such MLP, and the micro-step by one that announces itself."""
    for name in gated_mlps(run.model):
        compiled = CompiledMLP(run.model.get_submodule(name), **OPTIONS)
        run.model.set_submodule(name, compiled)
    run.micro_step = announced(run.micro_step)
