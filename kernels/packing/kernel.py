"""The candidate: the same layers on packs, at the length that the documents have or at another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import nn

from loop.batch import PackedBatch
from loop.model import forward_body


def packed_layers(model: nn.Module, batch: PackedBatch) -> torch.Tensor:
    """Last hidden states [real_tokens, D] of all documents in one pack; batch without padding of its own."""
    return forward_body(model, batch).flatten(0, 1)


def joined(packs: Sequence[PackedBatch]) -> PackedBatch:
    """Batches [B, L] as a single pack [1, all their positions], on their device and without a synchronisation: the same
    documents in order, padding where it was."""
    names = ("input_ids", "labels", "position_ids")
    lengths = tuple(length for p in packs for length in p.lengths)
    first = list(accumulate((len(p.lengths) for p in packs), initial=0))
    begun = list(accumulate((p.positions for p in packs), initial=0))
    one = PackedBatch(
        **{name: torch.cat([getattr(p, name).flatten() for p in packs])[None] for name in names},
        cu_seqlens=torch.tensor((0, *lengths)).cumsum(0).to(packs[0].cu_seqlens),
        real_tokens=sum(p.real_tokens for p in packs),
        supervised_tokens=sum(p.supervised_tokens for p in packs),
        padding=tuple(start + number for start, p in zip(first, packs, strict=False) for number in p.padding),
    )
    moved = [p.supervised_positions + start for start, p in zip(begun, packs, strict=False)]
    counts = tuple(count for p in packs for count in p.supervised_by_document)
    one.__dict__.update(lengths=lengths, supervised_positions=torch.cat(moved), supervised_by_document=counts)
    return one


def stacked(packs: Sequence[PackedBatch]) -> PackedBatch:
    """Packs [1, L] as the rows of one batch [B, L]; on the flattened positions nothing differs from `joined`."""
    one = joined(packs)
    made = replace(one, **{n: getattr(one, n).view(len(packs), -1) for n in ("input_ids", "labels", "position_ids")})
    made.__dict__.update({n: getattr(one, n) for n in ("lengths", "supervised_positions", "supervised_by_document")})
    return made


def split(batch: PackedBatch, capacity: int) -> list[PackedBatch]:
    """The documents of a batch, padding left out, in packs of one row: in order, each pack with as many as `capacity`
    positions hold. A longer document is a pack of its own, so no pack has padding and packs differ in length.

    Same tokens, labels and order; real and supervised tokens add up to the batch's.
    """
    out: list[list[int]] = []
    room = 0
    for number, length in enumerate(batch.lengths):
        if number in batch.padding:
            continue
        if length > room or not out:
            out.append([])
            room = max(capacity, length)
        out[-1].append(number)
        room -= length
    starts = list(accumulate(batch.lengths, initial=0))
    return [_pack(batch, [(starts[number], batch.lengths[number]) for number in numbers], numbers) for numbers in out]


def _pack(batch: PackedBatch, spans: list[tuple[int, int]], numbers: list[int]) -> PackedBatch:
    def taken(x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten()
        return torch.cat([flat[start : start + length] for start, length in spans])[None]

    ends = torch.tensor([0, *(length for _, length in spans)]).cumsum(0)
    made = replace(
        batch,
        input_ids=taken(batch.input_ids),
        labels=taken(batch.labels),
        position_ids=taken(batch.position_ids),
        cu_seqlens=ends.to(batch.cu_seqlens),
        real_tokens=sum(length for _, length in spans),
        supervised_tokens=sum(batch.supervised_by_document[number] for number in numbers),
        padding=(),
    )
    made.__dict__["lengths"] = tuple(length for _, length in spans)
    return made
