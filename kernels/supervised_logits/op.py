"""The two loss heads as functions of one input tuple, for the op check and the microbenchmark."""

from __future__ import annotations

import torch
from torch import nn

from kernels.contract import Op, Workload
from loop.batch import IGNORE, PackedBatch

from .kernel import supervised_cross_entropy
from .reference import cross_entropy_head


class HeadOnly(nn.Module):
    """What a loss head needs of a model: its output projection, [vocabulary, hidden]."""

    def __init__(self, weight: torch.Tensor, trained: bool) -> None:
        super().__init__()
        self.lm_head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.lm_head.weight = nn.Parameter(weight, requires_grad=trained)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head


def loss_head_op(*workloads: Workload) -> Op:
    """B packs of L positions and width D, vocabulary V, S supervised positions; `trained`: is the head, or frozen (LoRA)."""
    return Op(cross_entropy_head, supervised_cross_entropy, _inputs, workloads, _bytes_moved, _flops)


def _inputs(workload: Workload, device: torch.device, seed: int) -> tuple[HeadOnly, torch.Tensor, PackedBatch]:
    """The head, hidden [B, L, D] that requires a gradient, and a batch of one document a pack."""
    B, L, D, V, S = (workload.shape[key] for key in ("B", "L", "D", "V", "S"))
    dtype, generator = getattr(torch, workload.dtype), torch.Generator(device).manual_seed(seed)
    weight = torch.randn(V, D, generator=generator, device=device) * D**-0.5
    hidden = torch.randn(B, L, D, generator=generator, device=device).to(dtype).requires_grad_()
    head = HeadOnly(weight.to(dtype), bool(workload.shape["trained"]))
    return head, hidden, _batch(B, L, V, S, seed).to(device)


def _batch(B: int, L: int, V: int, S: int, seed: int) -> PackedBatch:
    """Random tokens, S of them labels. The last position of a pack has no next token, so at most B * (L - 1) are."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (B, L), generator=generator)
    labels = torch.full((B, L), IGNORE)
    predictable = torch.arange(B * L).view(B, L)[:, :-1].flatten()
    chosen = predictable[torch.randperm(len(predictable), generator=generator)[:S]]
    labels.view(-1)[chosen] = ids.roll(-1, dims=1).flatten()[chosen]
    cu_seqlens = torch.arange(0, B * L + 1, L, dtype=torch.int32)
    return PackedBatch(ids, labels, torch.arange(L).repeat(B, 1), cu_seqlens, B * L, S)


def _flops(workload: Workload) -> int:
    """The vocabulary product of supervised rows: forward, d hidden and, where the head is trained, d weight."""
    D, V, S, trained = (workload.shape[key] for key in ("D", "V", "S", "trained"))
    return 2 * S * D * V * (3 if trained else 2)


def _bytes_moved(workload: Workload) -> int:
    """Supervised rows and the weight once forward and once backward, d hidden whole, and d weight where it is trained.

    Logits count as nothing: a fused head could keep them on the chip.
    """
    B, L, D, V, S, trained = (workload.shape[key] for key in ("B", "L", "D", "V", "S", "trained"))
    return getattr(torch, workload.dtype).itemsize * (2 * S * D + (3 if trained else 2) * V * D + B * L * D)
