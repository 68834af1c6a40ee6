"""Qwen3.5's gated-delta layer with packed documents kept apart.

transformers' pure-PyTorch path takes `cu_seqlens` and ignores it: the convolution reads, and the delta-rule state carries
over, whatever came before in the pack. Here both run once per document, through transformers' own functions, so a packed
document is computed exactly as an unpacked one would be.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn

from loop.batch import PackedBatch


@dataclass(frozen=True)
class Pack:
    """Document boundaries of one micro-batch: `cu_seqlens` [N + 1] int32 on the device, `lengths` on the host."""

    cu_seqlens: torch.Tensor
    lengths: tuple[int, ...]

    @cached_property
    def cu_seqlens_cpu(self) -> torch.Tensor:
        """`cu_seqlens` on the host, int32 [N + 1], without a device synchronisation."""
        return torch.tensor((0, *self.lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)

    @classmethod
    def of(cls, batch: PackedBatch) -> Pack:
        return cls(batch.cu_seqlens, batch.lengths)


class PackedDeltaNet(nn.Module):
    """Stands in for `Qwen3_5GatedDeltaNet`: same submodules, same parameter names, same arithmetic, one document at a time.

    A subclass may replace `convolve` and `delta_rule`; the flattened [1, B * L] layout makes documents contiguous.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        # torch's bookkeeping (parameters, buffers, submodules) and plain attributes (dimensions) alike: names stay.
        self.__dict__.update(original.__dict__)

    def forward(self, hidden_states: torch.Tensor, pack: Pack | None = None, **_: object) -> torch.Tensor:
        """hidden_states [B, L, D] -> [B, L, D]. Without `pack`, every row is one document."""
        B, L, D = hidden_states.shape
        if pack is None:
            pack = Pack(torch.arange(B + 1, dtype=torch.int32, device=hidden_states.device) * L, (L,) * B)
        flat = hidden_states.reshape(1, B * L, D)

        qkv = self.convolve(self.in_proj_qkv(flat), pack)  # [1, B*L, 2*key_dim + value_dim]
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        q = q.reshape(1, B * L, -1, self.head_k_dim)
        k = k.reshape(1, B * L, -1, self.head_k_dim)
        v = v.reshape(1, B * L, -1, self.head_v_dim)
        beta = self.in_proj_b(flat).sigmoid()
        g = -self.A_log.float().exp() * F.softplus(self.in_proj_a(flat).float() + self.dt_bias)

        out = self.delta_rule(q, k, v, g, beta, pack)  # [1, B*L, value heads, head_v_dim]
        z = self.in_proj_z(flat).reshape(-1, self.head_v_dim)
        out = self.norm(out.reshape(-1, self.head_v_dim), z)
        return self.out_proj(out.reshape(B, L, -1))

    def convolve(self, x: torch.Tensor, pack: Pack) -> torch.Tensor:
        """Causal depthwise convolution and activation, x [1, T, C] -> [1, T, C], reset at every document."""
        conv = _plain("causal_conv1d_fn")
        weight = self.conv1d.weight.squeeze(1)
        pieces = [
            conv(piece, weight, self.conv1d.bias, activation=self.activation)
            for piece in x.transpose(1, 2).split(pack.lengths, dim=-1)
        ]
        return torch.cat(pieces, dim=-1).transpose(1, 2)

    def delta_rule(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, pack: Pack
    ) -> torch.Tensor:
        """q, k [1, T, key heads, K]; v [1, T, value heads, V]; g, beta [1, T, value heads] -> [1, T, value heads, V]."""
        rule = _plain("torch_chunk_gated_delta_rule")
        groups = self.num_v_heads // self.num_k_heads
        if groups > 1:
            q, k = (x.repeat_interleave(groups, dim=2) for x in (q, k))
        documents = zip(*(x.split(pack.lengths, dim=1) for x in (q, k, v, g, beta)), strict=True)
        return torch.cat(
            [rule(*document, use_qk_l2norm_in_kernel=True, output_final_state=False)[0] for document in documents], dim=1
        )


def _plain(name: str):
    """transformers' pure-PyTorch function, whatever it bound when the modelling file was imported."""
    from transformers.models.qwen3_5 import modeling_qwen3_5

    return inspect.unwrap(getattr(modeling_qwen3_5, name))


def isolate_documents(model: nn.Module) -> int:
    """Swaps every gated-delta layer of `model` for a `PackedDeltaNet`; returns how many."""
    swapped = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "Qwen3_5GatedDeltaNet":
                setattr(parent, name, PackedDeltaNet(child))
                swapped += 1
    return swapped
