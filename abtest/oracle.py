"""The truth that gradients are compared with: higher precision, and every document on its own.

The oracle of an fp32 run, and of any small model, computes in fp64; that of a large bf16 model in fp32 (TF32 off,
attention as plain mathematics), on the same weights as the arm's compute dtype holds. Documents are never packed, so an
arm that lets one document see another differs from it. The delta rule runs in transformers' chunks, since token by token
takes hours at a real size; that the two are the same is checked on short documents (`recurrence_error`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from abtest.gradients import pooled
from abtest.probes import cut, documents, pack, supervised
from loop.batch import IGNORE, PackedBatch
from loop.delta_net import CHUNK, PackedDeltaNet
from loop.model import plain_micro_step
from loop.run import Run

FP64_PARAMETERS = 2**26  # up to this size fp64 costs little anywhere; beyond, many GPUs take 64 times as long for it
# Positions that are computed at a time where documents are shorter. So many keep what backward needs, which takes no more
# memory than the logits of a pack and spares a second forward; a longer document is recomputed, if the run recomputes.
TOGETHER = 2048


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
            with sdpa_kernel(SDPBackend.MATH):
                yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def make_exact(run: Run) -> torch.dtype:
    """Raises the run's model to the oracle's dtype, values unchanged, and collects its gradients there.

    Returns that dtype.
    """
    size = sum(parameter.numel() for parameter in run.model.parameters())
    dtype = torch.float64 if run.dtype == torch.float32 or size <= FP64_PARAMETERS else torch.float32
    if dtype == torch.float64:
        run.model.gradient_checkpointing_disable()  # a recomputed forward would not see `_Promote`
    run.model.to(dtype)
    run.optimizer.release()
    run.optimizer = ExactGradients(run.optimizer.parameters)
    return dtype


class ExactGradients:
    """Stands where the optimizer stood, whose hooks would round: gradients stay what backward made them."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        self.parameters = self.masters = parameters

    def gradients(self) -> dict[str, torch.Tensor | None]:
        return {name: parameter.grad for name, parameter in self.parameters.items()}

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None


def unpacked(batch: PackedBatch) -> Iterator[PackedBatch]:
    """The documents of a pack as rows of plain batches, those of about the same length together, `TOGETHER` positions if
    that is more than one.

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
    for length, own in sorted(by_length.items()):
        count = max(1, TOGETHER // length)
        for first in range(0, len(own), count):
            yield _rows(own[first : first + count], length)


def _rows(documents: Sequence[tuple[torch.Tensor, torch.Tensor]], length: int) -> PackedBatch:
    """Ids and labels of documents, each in a row of `length` of its own."""
    ids = torch.stack([F.pad(ids, (0, length - len(ids))) for ids, _ in documents])
    labels = torch.stack([F.pad(labels, (0, length - len(labels)), value=IGNORE) for _, labels in documents])
    positions = torch.arange(length, device=ids.device).expand(len(documents), -1)
    cu_seqlens = torch.arange(0, ids.numel() + 1, length, dtype=torch.int32, device=ids.device)
    return PackedBatch(ids, labels, positions, cu_seqlens, ids.numel(), int((labels != IGNORE).sum()))


@contextmanager
def keeping(model: torch.nn.Module, wanted: bool) -> Iterator[None]:
    """If `wanted`, nothing that backward needs is recomputed inside the block; transformers' layers look at a flag of
    theirs in every forward. Gradients have the same bits either way."""
    recomputed = [module for module in model.modules() if wanted and getattr(module, "gradient_checkpointing", False)]
    for module in recomputed:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in recomputed:
            module.gradient_checkpointing = True


def exact_gradients(
    run: Run, probe: Sequence[PackedBatch], dtype: torch.dtype, together: int = TOGETHER
) -> dict[str, torch.Tensor]:
    """Gradients of a probe's micro-batches together by canonical name, from unpacked documents; `run` went through
    `make_exact`. together: up to so many positions at a time keep what backward needs.

    Raises RuntimeError when a trained parameter gets none: a comparison with nothing would pass everything.
    """
    run.optimizer.zero_grad()
    with exact_arithmetic(dtype):
        for batch in probe:
            for rows in unpacked(batch):
                with keeping(run.model, rows.positions <= together):
                    plain_micro_step(run, rows.to(run.device), supervised(probe))
    gradients = run.optimizer.gradients()
    missing = [name for name, gradient in gradients.items() if gradient is None]
    if missing:
        raise RuntimeError(f"the oracle has no gradient for {len(missing)} parameters, first {missing[0]}")
    return gradients


def packing_error(
    run: Run, probe: Sequence[PackedBatch], dtype: torch.dtype, truth: Mapping[str, torch.Tensor]
) -> tuple[float, str]:
    """How far the reference's own packed path is from unpacked documents when rounding is out of the way.

    The worst parameter's relative gradient error, and its name. In bf16 a small leak could hide in rounding; here the same
    model code, packed, runs in the oracle's arithmetic.
    """
    run.optimizer.zero_grad()
    with exact_arithmetic(dtype):
        for batch in probe:
            plain_micro_step(run, batch.to(run.device), supervised(probe))
    return worst_error(run.optimizer.gradients(), truth)


def worst_error(gradients: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor]) -> tuple[float, str]:
    """The largest relative distance |g - g*| / |g*| of any parameter, and its name; NaN is larger than anything.

    Small tensors are pooled across layers, as in the comparison of arms: four decay rates alone are ill-conditioned.
    """
    worst, where = 0.0, ""
    for key, names in pooled({name: gradient.numel() for name, gradient in gradients.items()}).items():
        norm = math.hypot(*(float(truth[name].norm()) for name in names))
        distance = math.hypot(*(float((gradients[name] - truth[name].to(gradients[name].device)).norm()) for name in names))
        error = distance / norm if norm != 0 else (0.0 if distance == 0 else math.inf)
        if math.isnan(error):
            return error, key  # nothing outranks it
        if error > worst:
            worst, where = error, key
    return worst, where


RECURRENCE_LENGTH = 96  # tokens a document, more than a chunk


class Recurrence(PackedDeltaNet):
    """The gated delta rule token by token, from its definition (Yang, Kautz, Hatamizadeh 2024, arXiv 2412.06464)."""

    def delta_rule(self, q, k, v, g, beta, pack):
        copies = self.num_v_heads // self.num_k_heads
        if copies > 1:
            q, k = (x.repeat_interleave(copies, dim=2) for x in (q, k))
        groups = zip(*(pack.split(x) for x in (q, k, v, g, beta)), strict=True)
        return pack.join([recurrence(*rows) for rows in groups])


def recurrence(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """q, k [N, L, H, K]; v [N, L, H, V]; g (log decay), beta [N, L, H] -> [N, L, H, V].

    S <- exp(g) S;  S <- S + k (beta (v - S^T k))^T;  o = S^T q, with q and k of unit length and q over sqrt(K).
    """
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    state = v.new_zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1])
    out = []
    for t in range(v.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        seen = torch.einsum("nhkv,nhk->nhv", state, k[:, t])
        change = beta[:, t, :, None] * (v[:, t] - seen)
        state = state + torch.einsum("nhk,nhv->nhkv", k[:, t], change)
        out.append(torch.einsum("nhkv,nhk->nhv", state, q[:, t]))
    return torch.stack(out, dim=1) / math.sqrt(k.shape[-1])


def recurrence_error(run: Run, batch: PackedBatch, dtype: torch.dtype) -> tuple[float, str] | None:
    """How far the oracle's chunked delta rule is from the recurrence, on the batch's documents cut short: the worst
    parameter's relative gradient error and its name. None for a model without a delta rule."""
    layers = [name for name, module in run.model.named_modules() if type(module) is PackedDeltaNet]
    if not layers:
        return None
    short = pack([[cut(ids, labels, RECURRENCE_LENGTH) for ids, labels in documents(batch)[:8]]])
    chunked = {name: value.clone() for name, value in exact_gradients(run, [short], dtype).items()}
    for name in layers:
        module = run.model.get_submodule(name)
        module.__class__ = Recurrence  # the oracle's own model, which nothing else sees
    try:
        return worst_error(exact_gradients(run, [short], dtype, together=0), chunked)  # a state a token is a lot to keep
    finally:
        for name in layers:
            run.model.get_submodule(name).__class__ = PackedDeltaNet
