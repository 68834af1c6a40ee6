"""Qwen3.5's gated-delta layer with packed documents kept apart.

transformers' pure-PyTorch path takes `cu_seqlens` and ignores it: the convolution reads, and the delta-rule state carries
over, whatever came before in the pack. Here every document is a row of its own, and both run through transformers' own
functions, one call for all documents of about the same length.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn

from loop.batch import PackedBatch

CHUNK = 64  # of transformers' delta rule, which pads every sequence to a multiple of it


@dataclass(frozen=True)
class Pack:
    """Document boundaries of one micro-batch: `cu_seqlens` [N + 1] int32 on the device, `lengths` on the host. rows: its
    supervised positions, int64 [S] on the device, ascending; None where nobody knows them, so that all count."""

    cu_seqlens: torch.Tensor
    lengths: tuple[int, ...]
    rows: torch.Tensor | None = None

    @classmethod
    def of(cls, batch: PackedBatch) -> Pack:
        return cls(batch.cu_seqlens, batch.lengths, batch.supervised_positions)

    @cached_property
    def cu_seqlens_cpu(self) -> torch.Tensor:
        """`cu_seqlens` on the host, int32 [N + 1], without a device synchronisation."""
        return torch.tensor((0, *self.lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)

    @cached_property
    def chunk_indices(self) -> torch.Tensor:
        """Document of every chunk of 64 positions, and place in it; [chunks, 2] like `cu_seqlens`, made on the host."""
        counts = torch.tensor([-(-length // CHUNK) for length in self.lengths])
        documents = torch.arange(len(counts)).repeat_interleave(counts)
        places = torch.arange(len(documents)) - (counts.cumsum(0) - counts)[documents]
        return torch.stack([documents, places], dim=1).to(self.cu_seqlens)

    @cached_property
    def groups(self) -> tuple[torch.Tensor, ...]:
        """Documents of the same number of chunks, as rows: flat positions [documents, chunks * 64], int64 on the device.

        A row is filled up with the position one past the end, T. Rows differ from unpacked documents only in the zeros
        behind them, which transformers' function would add itself.
        """
        rows: dict[int, list[torch.Tensor]] = {}
        for start, length in zip(self.cu_seqlens_cpu.tolist(), self.lengths, strict=False):
            padded = -(-length // CHUNK) * CHUNK
            row = torch.full((padded,), sum(self.lengths))
            row[:length] = torch.arange(start, start + length)
            rows.setdefault(padded, []).append(row)
        return tuple(torch.stack(group).to(self.cu_seqlens.device) for _, group in sorted(rows.items()))

    @cached_property
    def back(self) -> torch.Tensor:
        """Where each flat position went in the concatenated groups, int64 [T] on the device."""
        places = torch.cat([group.flatten() for group in self.groups])
        back = torch.empty(sum(self.lengths) + 1, dtype=torch.int64, device=places.device)
        back[places] = torch.arange(places.numel(), device=places.device)
        return back[:-1]

    @cached_property
    def starts(self) -> torch.Tensor:
        """Where the document of each flat position begins, int32 [T] on the device, without a device synchronisation."""
        lengths = self.cu_seqlens.diff()
        return torch.repeat_interleave(self.cu_seqlens[:-1], lengths, output_size=sum(self.lengths))

    @cached_property
    def ends(self) -> torch.Tensor:
        """One past the last position of the document of each flat position, like `starts`."""
        lengths = self.cu_seqlens.diff()
        return torch.repeat_interleave(self.cu_seqlens[1:], lengths, output_size=sum(self.lengths))

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x [1, T, ...] -> one [documents, chunks * 64, ...] for every group, zeros behind each document."""
        padded = torch.cat([x.squeeze(0), x.new_zeros(1, *x.shape[2:])])  # backward of x[0] would copy
        return [padded.index_select(0, group.flatten()).view(*group.shape, *x.shape[2:]) for group in self.groups]

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The inverse of `split`."""
        return torch.cat([part.flatten(0, 1) for part in parts]).index_select(0, self.back)[None]


class QkvMixer(nn.Module):
    """What may take the place of a layer's `conv1d` and do all of `PackedDeltaNet.mix`, the L2 norm of q and k included.

    forward(x [1, T, 2 * key_dim + value_dim], pack) -> q, k [1, T, key heads, K] of length 1, v [1, T, value heads, V].
    """


class DecayGates(nn.Module):
    """What a gated-delta layer makes of its projections a and b; something else may stand in its place."""

    def forward(
        self, a: torch.Tensor, b: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """a, b [..., value heads], A_log, dt_bias [value heads] -> beta like b, and g, the log decay, in fp32 like a."""
        return b.sigmoid(), -A_log.float().exp() * F.softplus(a.float() + dt_bias)


class PackedDeltaNet(nn.Module):
    """Stands in for `Qwen3_5GatedDeltaNet`: same submodules, same parameter names, same arithmetic, documents apart.

    A subclass may replace `convolve` and `delta_rule`, a `QkvMixer` the module `conv1d`, and another module `gates`, under
    either of them; the flattened [1, B * L] layout makes documents contiguous.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        # torch's bookkeeping (parameters, buffers, submodules) and plain attributes (dimensions) alike: names stay.
        self.__dict__.update(original.__dict__)
        if "gates" not in self._modules:  # else it is made of another PackedDeltaNet
            self.gates = DecayGates()

    def forward(self, hidden_states: torch.Tensor, pack: Pack | None = None, **_: object) -> torch.Tensor:
        """hidden_states [B, L, D] -> [B, L, D]. Without `pack`, every row is one document."""
        B, L, D = hidden_states.shape
        if pack is None:
            pack = Pack(torch.arange(B + 1, dtype=torch.int32, device=hidden_states.device) * L, (L,) * B)
        flat = hidden_states.reshape(1, B * L, D)

        q, k, v = self.mix(self.in_proj_qkv(flat), pack)
        b, a = self.in_proj_b(flat), self.in_proj_a(flat)
        beta, g = self.gates(a, b, self.A_log, self.dt_bias)

        out = self.delta_rule(q, k, v, g, beta, pack)  # [1, B*L, value heads, head_v_dim]
        z = self.in_proj_z(flat).reshape(-1, self.head_v_dim)
        out = self.norm(out.reshape(-1, self.head_v_dim), z)
        return self.out_proj(out.reshape(B, L, -1))

    @property
    def qk_normalized(self) -> bool:
        """Whether q and k come to the delta rule with length 1, so that it must not normalise them."""
        return isinstance(self.conv1d, QkvMixer)

    def mix(self, x: torch.Tensor, pack: Pack) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [1, T, 2 * key_dim + value_dim] -> q, k [1, T, key heads, K], v [1, T, value heads, V]: convolved, and split."""
        if self.qk_normalized:
            return self.conv1d(x, pack)
        T = x.shape[1]
        q, k, v = self.convolve(x, pack).split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        q = q.reshape(1, T, -1, self.head_k_dim)
        k = k.reshape(1, T, -1, self.head_k_dim)
        return q, k, v.reshape(1, T, -1, self.head_v_dim)

    def convolve(self, x: torch.Tensor, pack: Pack) -> torch.Tensor:
        """Causal depthwise convolution and activation, x [1, T, C] -> [1, T, C], reset at every document."""
        conv, weight = _plain("causal_conv1d_fn"), self.conv1d.weight.squeeze(1)
        return pack.join(
            [
                conv(rows.transpose(1, 2), weight, self.conv1d.bias, activation=self.activation).transpose(1, 2)
                for rows in pack.split(x)
            ]
        )

    def delta_rule(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, pack: Pack
    ) -> torch.Tensor:
        """q, k [1, T, key heads, K]; v [1, T, value heads, V]; g, beta [1, T, value heads] -> [1, T, value heads, V]."""
        rule = _plain("torch_chunk_gated_delta_rule")
        copies = self.num_v_heads // self.num_k_heads
        if copies > 1:
            q, k = (x.repeat_interleave(copies, dim=2) for x in (q, k))
        groups = zip(*(pack.split(x) for x in (q, k, v, g, beta)), strict=True)
        options = {"chunk_size": CHUNK, "use_qk_l2norm_in_kernel": not self.qk_normalized}
        return pack.join([rule(*rows, **options)[0] for rows in groups])


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
