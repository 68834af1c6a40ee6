"""The head and loss of a run that trains the head: its weight's gradient goes straight into the optimizer's fp32 sum."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kernels.full_ft_linear.kernel import MainGrad
from kernels.supervised_logits.kernel import supervised_rows
from loop.batch import PackedBatch
from loop.optim import MasterAdamW

from . import kernel

scaled = torch.ops.isoloss.linear_cross_entropy_backward  # gradient, factor, dtype: rounded once to that dtype


class MainGradHead:
    """As `linear_cross_entropy_head`, but for the weight's gradient.

    That is fp32 already when forward ends; it is multiplied by the incoming one on its way to the optimizer's sum, and
    neither rounded nor seen by autograd.
    """

    def __init__(self, optimizer: MasterAdamW) -> None:
        self.main = MainGrad(optimizer)

    def __call__(self, model: nn.Module, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """hidden [B, L, D] -> fp32 sum of cross-entropy over the batch's supervised positions, 0 where there are none."""
        rows, labels = supervised_rows(hidden, batch)
        weight = model.get_output_embeddings().weight
        if not torch.is_grad_enabled() or self.main.collector(weight) is None:
            return kernel.linear_cross_entropy(rows, weight, labels)
        kernel.check_inputs(rows, weight, labels)
        return _Loss.apply(rows, weight, labels, self)

    def deliver(self, gradient: Tensor, factor: Tensor, weight: nn.Parameter) -> Tensor | None:
        """Adds gradient * factor, both fp32, to the weight's main gradient. Returns what is left for autograd."""
        taken = self.main.take(weight, lambda held, into: kernel.add_scaled(gradient, factor, held, into))
        return None if taken else scaled(gradient, factor, weight.dtype)  # released since forward


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, labels: Tensor, head: MainGradHead) -> Tensor:
        needs_rows, needs_weight, *_ = ctx.needs_input_grad
        loss, d_rows, d_weight = torch.ops.isoloss.linear_cross_entropy(rows, weight, labels, needs_rows, needs_weight)
        ctx.save_for_backward(d_rows, d_weight)
        ctx.head, ctx.weight = head, weight
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor) -> tuple[Tensor | None, ...]:
        needs_rows, needs_weight, *_ = ctx.needs_input_grad
        d_rows, d_weight = ctx.saved_tensors
        rows = scaled(d_rows, dloss, ctx.weight.dtype) if needs_rows else None
        return rows, ctx.head.deliver(d_weight, dloss, ctx.weight) if needs_weight else None, None, None
