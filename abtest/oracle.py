"""The truth that gradients are compared with: higher precision, and every document on its own.

For a bf16 run the oracle computes in fp32 (TF32 off), for an fp32 run in fp64, on the same weights as the arm's compute
dtype holds. Documents are never packed, so an arm that lets one document see another differs from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode

from loop.batch import PackedBatch
from loop.model import plain_micro_step, trainable
from loop.run import Run

EXACT_DTYPE = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


class _Promote(TorchFunctionMode):
    """Where a model says fp32 in so many words (norms, rope, the delta rule, the loss), it gets fp64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return function(*args, **kwargs)


@contextmanager
def exact_arithmetic(dtype: torch.dtype) -> Iterator[None]:
    """fp32 without TF32, or fp64 throughout."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        if dtype == torch.float64:
            with _Promote():
                yield
        else:
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def make_exact(run: Run) -> torch.dtype:
    """Raises the run's model to the oracle's dtype, values unchanged, recomputation off. Returns that dtype."""
    dtype = EXACT_DTYPE[run.dtype]
    run.model.gradient_checkpointing_disable()
    run.model.to(dtype)
    return dtype


def documents(batch: PackedBatch) -> Iterator[PackedBatch]:
    """The documents of a pack, each as a batch of its own; those without a supervised token are left out."""
    ids, labels, positions = (x.flatten() for x in (batch.input_ids, batch.labels, batch.position_ids))
    start = 0
    for length in batch.lengths:
        part = slice(start, start + length)
        start += length
        supervised = int((labels[part] != -100).sum())
        if supervised:
            cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device=ids.device)
            yield PackedBatch(
                ids[part][None], labels[part][None], positions[part][None], cu_seqlens, length, supervised
            )  # fmt: skip


def exact_gradients(run: Run, batch: PackedBatch, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Gradients of one micro-batch by canonical name, from unpacked documents; `run` went through `make_exact`."""
    parameters = trainable(run.model)
    for parameter in parameters.values():
        parameter.grad = None
    with exact_arithmetic(dtype):
        for document in documents(batch):
            plain_micro_step(run, document.to(run.device), batch.supervised_tokens)
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
