"""Qwen3.5's decoder layer with its first residual addition inside the norm that follows, that of the residual's gradient
inside the backward of the norm before, and the proof that it is the same.

Imported only once a Qwen3.5 model is there: importing transformers' modelling file decides which fast paths it binds.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer

from kernels.stand_in import Calls, stand_ins


class FusedDecoderLayer(Qwen3_5DecoderLayer):
    """hidden_states [B, L, D] -> [B, L, D], on the submodules of the layer that it replaces.

    A Qwen3_5DecoderLayer still: transformers' gradient checkpointing and recording of hidden states find what they look for.
    """

    def __init__(self, original: Qwen3_5DecoderLayer):
        nn.Module.__init__(self)
        # Submodules, hooks and plain attributes alike, the checkpointing function among them: names and behaviour stay.
        self.__dict__.update(original.__dict__)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        normed, residual = self.input_layernorm(hidden_states, beside=True)
        given = {"hidden_states": normed, "attention_mask": attention_mask, **kwargs}
        if self.block_type == "linear_attention":
            mixed = self.linear_attn(cache_params=past_key_values, **given)
        else:
            positions = {"position_ids": position_ids, "position_embeddings": position_embeddings}
            mixed, _ = self.self_attn(past_key_values=past_key_values, **positions, **given)
        normed, residual = self.post_attention_layernorm(mixed, residual)
        return residual + self.mlp(normed)


def computes_the_same(layer: Qwen3_5DecoderLayer) -> bool:
    """Whether `layer`'s own forward calls what FusedDecoderLayer's calls, with the same arguments, to the same result.

    Both run on known values, with simple functions in place of the submodules. A version of transformers whose layer does
    anything more, or hands on anything else, is so told apart.
    """
    x = torch.linspace(-2.0, 3.0, 12, device="cpu").view(1, 3, 4)
    keywords = {name: object() for name in ("position_embeddings", "attention_mask", "position_ids", "past_key_values")}
    keywords |= {name: object() for name in ("use_cache", "pack", "anything_else")}
    outcomes = []
    for kind in (type(layer), FusedDecoderLayer):
        calls: Calls = []
        probe = copy.copy(layer)
        probe.__dict__["_modules"] = stand_ins(layer, calls)
        outcomes.append((kind.forward(probe, x, **keywords), calls))
    (own, own_calls), (fused, fused_calls) = outcomes
    return torch.equal(own, fused) and len(own_calls) == len(fused_calls) and all(map(_same, own_calls, fused_calls))


def _same(one: tuple[str, tuple, dict], other: tuple[str, tuple, dict]) -> bool:
    if one[0] != other[0] or len(one[1]) != len(other[1]) or one[2].keys() != other[2].keys():
        return False
    pairs = [*zip(one[1], other[1], strict=True), *((one[2][key], other[2][key]) for key in one[2])]
    return all(
        a is b or (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)) for a, b in pairs
    )
