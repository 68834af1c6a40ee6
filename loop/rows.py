"""One document a row, padded: what packing is compared with.

The documents of a micro-batch, in their order, as many at a time as have room in the positions that the packs have. Each row
is filled up behind its document to the longest of its pass. The filling needs no mask: a causal model can't see it from the
document, and it has no label, so it changes neither loss nor gradients; transformers then leaves attention's mask out.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from loop.batch import IGNORE, PackedBatch
from loop.model import plain_micro_step

if TYPE_CHECKING:
    from loop.run import Run

FILLING = 0  # a token that every vocabulary has; nothing sees it


def passes(lengths: list[int], positions: int) -> list[list[int]]:
    """Numbers of documents, in order, in passes of rows that take at most `positions` once all are as long as the longest of
    them; a document that has more than that has a pass of its own."""
    out: list[list[int]] = []
    longest = 0
    for number, length in enumerate(lengths):
        longest = max(longest, length)
        if not out or (len(out[-1]) + 1) * longest > positions:
            out.append([])
            longest = length
        out[-1].append(number)
    return out


def padded(batch: PackedBatch) -> list[PackedBatch]:
    """A micro-batch's documents as one or more batches of rows [N, longest], on its device, without a synchronisation.

    Same tokens, labels, positions and order; the real and supervised tokens add up to the batch's. A row is one document to
    every layer, filling included. What is padding in a pack is left out.
    """
    starts = list(accumulate(batch.lengths, initial=0))
    own = [number for number in range(len(batch.lengths)) if number not in set(batch.padding)]
    out = []
    for rows in passes([batch.lengths[number] for number in own], batch.positions):
        numbers = [own[row] for row in rows]
        out.append(_rows_of(batch, numbers, [starts[number] for number in numbers]))
    return out


def _rows_of(batch: PackedBatch, numbers: list[int], starts: list[int]) -> PackedBatch:
    """The documents of these numbers, which begin at the flattened positions `starts`, as padded rows."""
    device, lengths = batch.input_ids.device, [batch.lengths[number] for number in numbers]
    N, M = len(numbers), max(lengths)
    within = torch.arange(M)  # [M]
    filling = within >= torch.tensor(lengths)[:, None]  # [N, M]
    at = (torch.tensor(starts)[:, None] + within).masked_fill(filling, 0).to(device)
    filling = filling.to(device)
    made = PackedBatch(
        input_ids=batch.input_ids.flatten()[at].masked_fill(filling, FILLING),
        labels=batch.labels.flatten()[at].masked_fill(filling, IGNORE),
        position_ids=within.to(device).repeat(N, 1),
        cu_seqlens=torch.arange(0, N * M + 1, M, dtype=torch.int32).to(device),
        real_tokens=sum(lengths),
        supervised_tokens=sum(batch.supervised_by_document[number] for number in numbers),
    )
    made.__dict__["lengths"] = (M,) * N
    made.__dict__["supervised_positions"] = _supervised(batch, numbers, starts, M)
    return made


def _supervised(batch: PackedBatch, numbers: list[int], starts: list[int], longest: int) -> torch.Tensor:
    """The supervised positions of these documents in the flattened rows [N * longest], int64, ascending."""
    counts = batch.supervised_by_document
    begun = list(accumulate(counts, initial=0))
    moves = [row * longest - start for row, start in enumerate(starts)]  # from the pack to the rows
    parts = [
        batch.supervised_positions[begun[number] : begun[number] + counts[number]] + move
        for number, move in zip(numbers, moves, strict=True)
        if counts[number]
    ]
    return torch.cat(parts) if parts else batch.supervised_positions[:0]


def padded_micro_step(run: Run, batch: PackedBatch, step_supervised_tokens: int) -> torch.Tensor:
    """`plain_micro_step` of the same documents, one a row: the same loss sum and gradients but for rounding."""
    sums = [plain_micro_step(run, rows, step_supervised_tokens) for rows in padded(batch)]
    return torch.stack(sums).sum()


def positions_of(run: Run, batch: PackedBatch) -> int:
    """Positions that the run's micro-step computes for a batch, padding included."""
    if run.micro_step is not padded_micro_step:
        return batch.positions
    return sum(rows.positions for rows in padded(batch))
