"""Attention of Qwen3.5 and Qwen3 with norm and rotation of query and key in one call, and the proof that it is the same."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from kernels.norms import epsilon

from .reference import normed, rope_qk_norm_reference


@dataclass(frozen=True)
class Form:
    """What sets one kind of attention apart. module: where transformers has it. zero_centred: its norms multiply by
    1 + weight. gated: the query's projection has a gate behind each head. part: 1 over the part of a head that is rotated,
    where the model's settings say nothing else."""

    module: str
    zero_centred: bool
    gated: bool
    part: int


class FusedQkAttention(nn.Module):
    """hidden_states [B, L, D] -> [B, L, D] and attention weights, on the submodules of the attention that it replaces.

    The norms stay in their places, with their weights, and are not called.
    """

    def __init__(self, original: nn.Module, form: Form):
        super().__init__()
        # Submodules, hooks and plain attributes alike: names and behaviour stay.
        self.__dict__.update(original.__dict__)
        self.form, self.eps = form, epsilon(original.q_norm)
        self.eager_attention = importlib.import_module(form.module).eager_attention_forward

    def normed_and_rotated(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """query [B, L, heads, head_dim], key [B, L, kv heads, head_dim], cos and sin [B, L, rotated] -> like both."""
        from .kernel import rope_qk_norm

        weights = self.q_norm.weight, self.k_norm.weight
        return rope_qk_norm(query, key, *weights, cos, sin, self.eps, self.form.zero_centred)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        B, L = hidden_states.shape[:2]
        heads, gate = self.q_proj(hidden_states).view(B, L, -1, self.head_dim * (2 if self.form.gated else 1)), None
        if self.form.gated:
            heads, gate = heads.chunk(2, dim=-1)
        key = self.k_proj(hidden_states).view(B, L, -1, self.head_dim)
        value = self.v_proj(hidden_states).view(B, L, -1, self.head_dim).transpose(1, 2)
        query, key = (x.transpose(1, 2) for x in self.normed_and_rotated(heads, key, *position_embeddings))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        out, weights = self._attend(query, key, value, attention_mask, **kwargs)
        out = out.reshape(B, L, -1).contiguous()
        if gate is not None:
            out = out * torch.sigmoid(gate.reshape(B, L, -1))
        return self.o_proj(out), weights

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Whatever attention the model's configuration names at the time."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager_attention)
        dropout = self.attention_dropout if self.training else 0.0
        if hasattr(self, "sliding_window"):
            kwargs["sliding_window"] = self.sliding_window
        return attend(self, query, key, value, mask, dropout=dropout, scaling=self.scaling, **kwargs)


class _ByReference(FusedQkAttention):
    """The same around transformers' arithmetic, which runs anywhere and has its bits."""

    def normed_and_rotated(self, query, key, cos, sin):
        weights = self.q_norm.weight, self.k_norm.weight
        return rope_qk_norm_reference(query, key, *weights, cos, sin, self.eps, self.form.zero_centred)


class _Answer(nn.Module):
    """Takes a projection's place in a probe: writes down what it was given, and gives what it was told to."""

    def __init__(self, calls: list[torch.Tensor], answer: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.calls, self.answer = calls, answer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(x)
        return self.answer(x)


class _Norm(nn.Module):
    """Takes a norm's place in a probe."""

    def __init__(self, weight: torch.Tensor, eps: float, zero_centred: bool):
        super().__init__()
        self.weight, self.eps, self.zero_centred = nn.Parameter(weight, requires_grad=False), eps, zero_centred

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return normed(x, self.weight, self.eps, self.zero_centred)


def computes_the_same(layer: nn.Module, form: Form) -> bool:
    """Whether `layer`'s own forward has the bits that FusedQkAttention's has around transformers' arithmetic, on known
    values in fp32 on the CPU. A version of transformers whose attention does anything else is so told apart."""
    own_calls, fused_calls = [], []
    own = _run(_probe(layer, form, own_calls), type(layer).forward, form)
    fused = _run(_ByReference(_probe(layer, form, fused_calls), form), FusedQkAttention.forward, form)
    pairs = [*zip(own, fused, strict=True), *zip(own_calls, fused_calls, strict=False)]
    return len(own_calls) == len(fused_calls) and all(torch.equal(one, other) for one, other in pairs)


def _probe(layer: nn.Module, form: Form, calls: list[torch.Tensor]) -> nn.Module:
    """A copy of `layer` on the CPU whose projections give known values; its attention is transformers' eager one."""
    D, generator = layer.head_dim, torch.Generator("cpu").manual_seed(0)
    columns = 2 * D  # of two key heads
    widths = {
        "q_proj": columns * layer.num_key_value_groups * (2 if form.gated else 1),
        "k_proj": columns,
        "v_proj": columns,
    }
    parts: dict[str, nn.Module] = {"o_proj": _Answer(calls, lambda x: 1.5 * x)}
    for name, width in widths.items():
        value = torch.randn(1, 5, width, generator=generator, device="cpu")
        parts[name] = _Answer(calls, lambda x, value=value: value)
    for name in ("q_norm", "k_norm"):
        weight = 0.5 * torch.randn(D, generator=generator, device="cpu")
        parts[name] = _Norm(weight, epsilon(layer.q_norm), form.zero_centred)
    probe = copy.copy(layer)
    probe.__dict__["_modules"] = {name: parts[name] for name in layer._modules}
    probe.__dict__["config"] = SimpleNamespace(_attn_implementation="eager")
    probe.__dict__["training"] = False
    return probe


def _run(probe: nn.Module, forward: Callable[..., Any], form: Form) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and attention weights where every position sees the ones before it."""
    R = 2 * max(probe.head_dim // (2 * form.part), 1)
    angles = torch.linspace(-3.0, 3.0, 5 * R, device="cpu").view(1, 5, R)
    mask = torch.full((1, 1, 5, 5), -torch.inf, device="cpu").triu(1)
    hidden = torch.linspace(-1.0, 1.0, 5 * 4, device="cpu").view(1, 5, 4)
    return forward(probe, hidden, (angles.cos(), angles.sin()), mask, position_ids=None)
