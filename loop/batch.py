"""A micro-batch of packed documents."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

IGNORE = -100  # a label that is not supervised


@dataclass(frozen=True)
class PackedBatch:
    """One micro-step's input. B packs of L positions; documents never cross a row, and padding is a document of its own.

    input_ids [B, L] int64.
    labels [B, L] int64: `labels[b, t]` is the token that position t must predict (already shifted), or IGNORE. The last
        position of a document is always IGNORE, so no label crosses a boundary.
    position_ids [B, L] int64: restart at 0 in every document.
    cu_seqlens [N + 1] int32: document boundaries in the flattened [B * L] positions, padding included; the first is 0,
        the last B * L, and every multiple of L is among them.
    real_tokens: positions that are not padding. supervised_tokens: labels that are not IGNORE.
    padding: which of the documents are padding, by their number.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    real_tokens: int
    supervised_tokens: int
    padding: tuple[int, ...] = ()

    @property
    def positions(self) -> int:
        return self.input_ids.numel()

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Document lengths on the host, in order; reading them from `cu_seqlens` on a GPU would synchronise."""
        return tuple(torch.diff(self.cu_seqlens).tolist())

    @cached_property
    def supervised_positions(self) -> torch.Tensor:
        """Indices of the supervised positions in the flattened [B * L], int64 [supervised_tokens], ascending."""
        return (self.labels.flatten() != IGNORE).nonzero().flatten()

    @cached_property
    def supervised_by_document(self) -> tuple[int, ...]:
        """Supervised tokens of every document, on the host, in order."""
        bounds = torch.tensor((0, *self.lengths)).cumsum(0)
        return tuple(torch.searchsorted(self.supervised_positions.cpu(), bounds).diff().tolist())

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch on `device`. What depends on values is worked out before the move: no device synchronisation."""
        moved = replace(
            self, **{name: getattr(self, name).to(device) for name in ("input_ids", "labels", "position_ids", "cu_seqlens")}
        )
        moved.__dict__["lengths"] = self.lengths
        moved.__dict__["supervised_by_document"] = self.supervised_by_document
        moved.__dict__["supervised_positions"] = self.supervised_positions.to(device)
        return moved
