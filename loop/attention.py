"""Attention that repeats itself.

PyTorch's fused attention adds up dQ (or dK and dV) with atomics on CUDA, in an order that changes from run to run; a
reference that does not repeat itself bitwise can prove nothing. The kernels have a deterministic form, taken while
`torch.use_deterministic_algorithms` is strict. Strict everywhere would refuse `cumsum`, which the delta rule needs and
which does repeat itself; so it is strict during attention's backward alone.
"""

from __future__ import annotations

import torch
from torch import nn

NAME = "repeatable_sdpa"


def use_repeatable_attention(model: nn.Module) -> None:
    """Registers the attention function with transformers and selects it, with SDPA's masks."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def _attend(module: nn.Module, query: torch.Tensor, *arguments, **options) -> tuple[torch.Tensor, None]:
    """transformers' SDPA attention; where it is fused on CUDA, its backward is made to repeat itself."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    out, weights = sdpa_attention_forward(module, query, *arguments, **options)
    node = out.grad_fn
    while node is not None and query.is_cuda:
        if "Attention" in node.name():
            _strict_backward(node)
            break
        node = node.next_functions[0][0] if node.next_functions else None
    return out, weights


def _strict_backward(node: torch.autograd.graph.Node) -> None:
    before: list[tuple[bool, bool]] = []

    def enter(gradients):
        before.append((torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()))
        torch.use_deterministic_algorithms(True)

    def leave(inputs, outputs):
        enabled, warn_only = before.pop()
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)

    node.register_prehook(enter)
    node.register_hook(leave)
