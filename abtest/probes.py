"""Batches on which gradients are compared: real packs, and packs shaped to trip a kernel."""

from __future__ import annotations

import torch

from loop.batch import IGNORE, PackedBatch
from loop.data import Dataset

FAR = 1_000_000  # a step no training run reaches: its micro-batches are drawn from the same packs in another order
# Documents of 1 to 3 tokens, exact chunks of 64, one off either side, 128 and a half chunk, and what is left of the pack.
TRICKY_LENGTHS = (1, 2, 3, 64, 65, 63, 1, 128, 32, 7)


def probe_batches(dataset: Dataset, count: int, packs: int, vocabulary: int) -> list[PackedBatch]:
    """`count` micro-batches on the CPU: every fourth is tricky, the others are real."""
    real = [dataset.micro_batches(FAR + index, 1, packs)[0] for index in range(count)]
    L = dataset.pack_length
    return [tricky_batch(L, packs, vocabulary, index) if index % 4 == 3 else batch for index, batch in enumerate(real)]


def tricky_batch(pack_length: int, packs: int, vocabulary: int, seed: int) -> PackedBatch:
    """Random tokens in documents of `TRICKY_LENGTHS`, every third position unsupervised, one document wholly so."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (packs, pack_length), generator=generator)
    labels = torch.full_like(ids, IGNORE)
    positions = torch.zeros_like(ids)
    boundaries = [0]
    for row in range(packs):
        start = 0
        for index, length in enumerate(_lengths(pack_length, row)):
            end = start + length
            positions[row, start:end] = torch.arange(length)
            if index != 4:
                labels[row, start : end - 1] = ids[row, start + 1 : end]
                labels[row, start : end - 1 : 3] = IGNORE
            boundaries.append(row * pack_length + end)
            start = end
    supervised = int((labels != IGNORE).sum())
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
    return PackedBatch(ids, labels, positions, cu_seqlens, ids.numel(), supervised)


def _lengths(pack_length: int, row: int) -> list[int]:
    """The tricky lengths rotated by `row`, as many as fit, then one document with the rest."""
    out, left = [], pack_length
    rotated = TRICKY_LENGTHS[row:] + TRICKY_LENGTHS[:row]
    for length in rotated:
        if length < left:
            out.append(length)
            left -= length
    return [*out, left]
