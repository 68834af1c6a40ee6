"""Attention that repeats itself.

On CUDA PyTorch's fused attention adds up dQ (or dK and dV) with atomics, in an order that changes from run to run; a
reference that does not repeat itself bitwise can prove nothing. While `torch.use_deterministic_algorithms` is strict,
SDPA picks a kernel with a deterministic form and its backward takes it. Strict everywhere would refuse `cumsum`, which
the delta rule needs and which does repeat itself; so it is strict during attention alone.

That form has one thread block a head and row, which walks the whole row: one row of 5376 positions takes longer than the
rest of the model. So in half precision documents become rows, each with its part of the mask, as long as these parts are all
that the mask shows. In fp32, which is how the oracle checks that the mask keeps documents apart, it stays whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from loop.delta_net import Pack

NAME = "repeatable_sdpa"
PLAIN = "sdpa"  # transformers' own
REFERENCES = (PLAIN, NAME)


def use_repeatable_attention(model: nn.Module) -> None:
    """Registers the attention function with transformers and selects it, with SDPA's masks."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    pack: Pack | None = None, **options,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """transformers' SDPA attention, query [B, heads, L, D], key and value [B, kv heads, L, D] -> ([B, L, heads, D], None),
    repeatable on CUDA."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not on_gpu(query):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if attention_mask is not None and attention_mask.dtype == torch.bool and pack and query.dtype != torch.float32:
        parts = [_part_of(attention_mask, positions) for positions in pack.groups]
        # The answer is on the device. A graph that is being captured can't wait for it, and takes that of its warm-up.
        if not capturing(attention_mask):
            module.documents_apart = shows_only(attention_mask, parts)
        if module.documents_apart:
            return by_documents(module, query, key, value, parts, pack, _attend_strictly, **options)
    return _attend_strictly(module, query, key, value, attention_mask, **options)


def on_gpu(x: torch.Tensor) -> bool:
    return x.is_cuda


def capturing(x: torch.Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def shows_only(mask: torch.Tensor, parts: Sequence[torch.Tensor]) -> bool:
    """Whether `mask` [B, 1, L, L] shows nothing but what `parts` show, of which every position of filling shows itself."""
    B, _, L, _ = mask.shape
    filling = sum(part.shape[0] * part.shape[-1] for part in parts) - B * L
    return int(mask.sum()) == int(sum(part.sum() for part in parts)) - filling


def by_documents(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, masks: Sequence[torch.Tensor | None],
    pack: Pack, attention: Callable[..., tuple[torch.Tensor, None]], **options,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """`attention` once for all documents of about the same length, as rows; masks: one a group, [documents, 1, P, P] or
    [1, 1, P, P], None where plain causality is all."""
    B, _, L, _ = query.shape
    groups = zip(masks, *(pack.split(_positions_first(x)) for x in (query, key, value)), strict=True)
    parts = []
    for mask, *rows in groups:
        q, k, v = (x.transpose(1, 2) for x in rows)  # [documents, heads, P, D]
        parts.append(attention(module, q, k, v, mask, **options)[0])
    return pack.join(parts).unflatten(1, (B, L)).squeeze(0), None


def _positions_first(x: torch.Tensor) -> torch.Tensor:
    """[B, heads, L, D] -> [1, B * L, heads, D]."""
    return x.transpose(1, 2).flatten(0, 1)[None]


def _part_of(mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What the documents at flat `positions` [N, P] may see of themselves, [N, 1, P, P]; the filling sees itself alone."""
    B, _, L, _ = mask.shape
    filling = positions == B * L
    inside = positions.masked_fill(filling, 0)
    rows, at = inside[:, :1, None] // L, inside % L
    seen = mask[rows, 0, at[:, :, None], at[:, None, :]] & ~(filling[:, :, None] | filling[:, None, :])
    return (seen | torch.diag_embed(filling))[:, None]


def _attend_strictly(module: nn.Module, *arguments, **options) -> tuple[torch.Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    with _strict():
        out, weights = sdpa_attention_forward(module, *arguments, **options)
    node = out.grad_fn
    while node is not None and "Attention" not in node.name():
        node = node.next_functions[0][0] if node.next_functions else None
    if node is not None:
        _strict_backward(node)
    return out, weights


def _strict_backward(node: torch.autograd.graph.Node) -> None:
    """The context manager `_strict` around one node of the backward pass."""
    entered: list = []

    def enter(gradients):
        entered.append(_strict())
        entered[-1].__enter__()

    def leave(inputs, outputs):
        entered.pop().__exit__(None, None, None)

    node.register_prehook(enter)
    node.register_hook(leave)


@contextmanager
def _strict() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # a safety net that costs a launch an allocation
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill
