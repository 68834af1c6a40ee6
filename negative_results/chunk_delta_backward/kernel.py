"""`kept_delta_states` with `within.chunk_backward` in the place of FLA's kernels that stay within a chunk."""

from __future__ import annotations

from torch import Tensor

from kernels.kept_delta_states.kernel import KeptDeltaNet, Saved, kept_delta_rule
from loop.delta_net import Pack

from .within import chunk_backward


def chunked_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, pack: Pack, qk_normalized: bool = False
) -> Tensor:
    """As `kept_delta_rule`; K and V powers of 2 from 16 to 128."""
    return kept_delta_rule(q, k, v, g, beta, pack, qk_normalized, _within_chunks)


def _within_chunks(saved: Saved, do: Tensor, dh: Tensor, du: Tensor, scale: float) -> tuple[Tensor, ...]:
    return chunk_backward(
        saved.q, saved.k, saved.v, saved.v_new, saved.g, saved.beta, saved.A, saved.h, do, dh, du.contiguous(), scale,
        saved.cu_seqlens, saved.chunks,
    )  # fmt: skip


class ChunkedDeltaNet(KeptDeltaNet):
    """As `KeptDeltaNet`, whose forward it has."""

    def delta_rule(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, pack: Pack) -> Tensor:
        return chunked_delta_rule(q, k, v, g, beta, pack, self.qk_normalized)
