"""The truth that gradients are compared with: higher precision, and every document on its own.

For a bf16 run the oracle computes in fp32 (TF32 off), for an fp32 run in fp64, on the same weights as the arm's compute
dtype holds. Documents are never packed, so an arm that lets one document see another differs from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from loop.batch import IGNORE, PackedBatch
from loop.delta_net import CHUNK
from loop.model import plain_micro_step
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
    """Raises the run's model to the oracle's dtype, values unchanged. Returns that dtype."""
    dtype = EXACT_DTYPE[run.dtype]
    if dtype == torch.float64:
        run.model.gradient_checkpointing_disable()  # a recomputed forward would not see `_Promote`
    run.model.to(dtype)
    return dtype


def unpacked(batch: PackedBatch) -> Iterator[PackedBatch]:
    """The documents of a pack as rows of plain batches, those of about the same length together.

    Nothing is packed: a row holds one document, and behind it zeros that a causal model cannot see from the document.
    Documents without a supervised token have no gradient and are left out.
    """
    by_length: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    starts = [0, *torch.tensor(batch.lengths).cumsum(0).tolist()]
    for start, end in pairwise(starts):
        ids, labels = batch.input_ids.flatten()[start:end], batch.labels.flatten()[start:end]
        if bool((labels != IGNORE).any()):
            padded = -(-(end - start) // CHUNK) * CHUNK
            by_length.setdefault(padded, []).append((ids, labels))
    for length, rows in sorted(by_length.items()):
        ids = torch.stack([F.pad(ids, (0, length - len(ids))) for ids, _ in rows])
        labels = torch.stack([F.pad(labels, (0, length - len(labels)), value=IGNORE) for _, labels in rows])
        positions = torch.arange(length, device=ids.device).expand(len(rows), -1)
        cu_seqlens = torch.arange(0, ids.numel() + 1, length, dtype=torch.int32, device=ids.device)
        yield PackedBatch(ids, labels, positions, cu_seqlens, ids.numel(), int((labels != IGNORE).sum()))


def exact_gradients(run: Run, batch: PackedBatch, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Gradients of one micro-batch by canonical name, from unpacked documents; `run` went through `make_exact`.

    Raises RuntimeError when a trained parameter gets none: a comparison with nothing would pass everything.
    """
    run.optimizer.zero_grad()
    with exact_arithmetic(dtype):
        for rows in unpacked(batch):
            plain_micro_step(run, rows.to(run.device), batch.supervised_tokens)
    gradients = run.optimizer.gradients()
    missing = [name for name, gradient in gradients.items() if gradient is None]
    if missing:
        raise RuntimeError(f"the oracle has no gradient for {len(missing)} parameters, first {missing[0]}")
    return gradients


def packing_error(run: Run, batch: PackedBatch, dtype: torch.dtype, truth: dict[str, torch.Tensor]) -> tuple[float, str]:
    """How far the reference's own packed path is from unpacked documents when rounding is out of the way.

    The worst parameter's relative gradient error, and its name. In bf16 a small leak could hide in rounding; here the same
    model code, packed, runs in the oracle's arithmetic.
    """
    run.optimizer.zero_grad()
    with exact_arithmetic(dtype):
        plain_micro_step(run, batch.to(run.device), batch.supervised_tokens)
    worst, where = 0.0, ""
    for name, packed in run.optimizer.gradients().items():
        exact = truth[name].to(packed.device)
        norm, distance = float(exact.norm()), float((packed - exact).norm())
        error = distance / norm if norm != 0 else (0.0 if distance == 0 else math.inf)
        if math.isnan(error):
            return error, name  # nothing outranks it
        if error > worst:
            worst, where = error, name
    return worst, where
