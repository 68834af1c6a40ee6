"""Attention that repeats itself.

On CUDA PyTorch's fused attention adds up dQ (or dK and dV) with atomics, in an order that changes from run to run; a
reference that does not repeat itself bitwise can prove nothing. While `torch.use_deterministic_algorithms` is strict,
SDPA picks a kernel with a deterministic form and its backward takes it. Strict everywhere would refuse `cumsum`, which
the delta rule needs and which does repeat itself; so it is strict during attention alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

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


def attend(module: nn.Module, query: torch.Tensor, *arguments, **options) -> tuple[torch.Tensor, None]:
    """transformers' SDPA attention, query [B, heads, L, D] -> ([B, L, heads, D], None), repeatable on CUDA."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not query.is_cuda:
        return sdpa_attention_forward(module, query, *arguments, **options)
    with _strict():
        out, weights = sdpa_attention_forward(module, query, *arguments, **options)
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
