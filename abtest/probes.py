"""Batches on which gradients are compared: real packs, and packs shaped to trip a kernel.

A probe is one or more micro-batches whose gradients add up, as in one optimizer step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from loop.batch import IGNORE, PackedBatch
from loop.data import Dataset
from loop.errors import UserError

FAR = 1_000_000  # a step no training run reaches: its micro-batches are drawn from the same packs in another order
# Documents of 1 to 3 tokens, exact chunks of 64, one off either side, 128 and a half chunk, and what is left of the pack.
TRICKY_LENGTHS = (1, 2, 3, 64, 65, 63, 1, 128, 32, 7)
# One off the 64-token grid. One document with all the rest of a pack of thousands would cost the pure-PyTorch delta rule
# several times as much, chunk after chunk, and a document as long as the pack is a probe of its own.
REST = 961
CROWD = (3, 2, 4, 1) * 12  # more documents than a kernel's table of boundaries might hold
# Positions of a probe whose point is its shape. Real packs and the document as long as a pack stay as long as they are; as
# many tokens in all others would cost every arm and the oracle as much again, and show nothing more.
SHAPED = 2048
MEMORISED, MEMORISED_LENGTH = 16, 24  # documents of the overfit state, and their tokens

Probe = tuple[PackedBatch, ...]
Document = tuple[torch.Tensor, torch.Tensor]  # ids and labels, both [length]


def probes(dataset: Dataset, count: int, packs: int, vocabulary: int, seed: int = 0) -> list[Probe]:
    """`count` probes on the CPU, in turn: real packs; tricky ones, the second of them a crowd; two rows off the 64-token
    grid; uneven accumulation; one row with L % 128 == 64; one document as long as the pack. Those for their shape have up to
    `SHAPED` positions a pack. `seed` picks other packs and other random tokens.

    What teaches nothing gives nothing to compare: one long document stands in for it, as in packs of a few tokens.
    """
    L, S = dataset.pack_length, min(dataset.pack_length, SHAPED)

    def real(index: int) -> PackedBatch:
        return dataset.micro_batches(FAR + 1000 * seed + index, 1, packs)[0]

    def tricky(index: int) -> Probe:
        return (tricky_batch(S, packs, vocabulary, 100 * seed + index),)

    def crowded(index: int) -> Probe:
        return (tricky_batch(S, packs, vocabulary, 100 * seed + index, CROWD),)

    def two_rows(index: int) -> Probe:
        length = off_grid(max(2, S * packs // 2))
        return (repack(documents(real(index)), 2, length),)

    def uneven(index: int) -> Probe:
        own = documents(real(index))
        return repack(own, 1, max(2, S // 2)), _sparse(repack(own[::-1], 1, max(2, S // 2)))

    def off(index: int) -> Probe:
        return (repack(documents(real(index)), 1, off_grid(S)),)

    def long(index: int) -> Probe:
        return (one_document(L, vocabulary, 100 * seed + index),)

    kinds = (
        lambda i: (real(i),),
        tricky,
        two_rows,
        uneven,
        lambda i: (real(i),),
        off,
        crowded,
        long,
        lambda i: (real(i),),
        uneven,
    )
    made = [(index, kinds[index % len(kinds)](index)) for index in range(count)]
    return [probe if supervised(probe) else long(index) for index, probe in made]


def supervised(probe: Sequence[PackedBatch]) -> int:
    return sum(batch.supervised_tokens for batch in probe)


def off_grid(limit: int) -> int:
    """The largest length up to `limit` that is 64 beyond a multiple of 128; `limit` itself where there is none."""
    return limit - (limit - 64) % 128 if limit >= 64 else limit


def documents(batch: PackedBatch) -> list[Document]:
    """The documents of a batch, padding left out where there is anything else."""
    starts = [0, *torch.tensor(batch.lengths).cumsum(0).tolist()]
    ids, labels = batch.input_ids.flatten(), batch.labels.flatten()
    every = [(ids[a:b], labels[a:b]) for a, b in pairwise(starts)]
    return [document for document in every if bool((document[1] != IGNORE).any())] or every


def repack(own: Sequence[Document], rows: int, length: int) -> PackedBatch:
    """Documents, over and over as needed and cut where a row ends, as `rows` packs of `length`."""
    out: list[list[Document]] = []
    index = 0
    for _ in range(rows):
        row, left = [], length
        while left:
            ids, labels = own[index % len(own)]
            row.append(cut(ids, labels, left))
            left -= len(row[-1][0])
            index += 1
        out.append(row)
    return pack(out)


def cut(ids: torch.Tensor, labels: torch.Tensor, length: int) -> Document:
    """The first `length` tokens, or the last ones that teach where a prompt is all of the first; the last token of them has
    nothing left to predict."""
    taught = (labels != IGNORE).nonzero().flatten().tolist()
    start = max(0, taught[-1] + 2 - length) if taught and taught[0] > length - 2 else 0
    ids, labels = ids[start:][:length], labels[start:][:length].clone()
    labels[-1] = IGNORE
    return ids, labels


def pack(rows: Sequence[Sequence[Document]]) -> PackedBatch:
    """Rows of documents, each row of the same total length, as a batch without padding."""
    ids = torch.stack([torch.cat([document[0] for document in row]) for row in rows])
    labels = torch.stack([torch.cat([document[1] for document in row]) for row in rows])
    positions = torch.stack([torch.cat([torch.arange(len(document[0])) for document in row]) for row in rows])
    lengths = torch.tensor([0] + [len(document[0]) for row in rows for document in row])
    return PackedBatch(ids, labels, positions, lengths.cumsum(0).to(torch.int32), ids.numel(), int((labels != IGNORE).sum()))


def _sparse(batch: PackedBatch) -> PackedBatch:
    """The same batch with one in five of its labels left, so that micro-batches of one step are unevenly supervised."""
    labels = batch.labels.clone()
    kept = (labels.flatten() != IGNORE).nonzero().flatten()
    drop = kept[torch.arange(len(kept)) % 5 != 0]
    labels.view(-1)[drop] = IGNORE
    own = [
        (a, b)
        for a, b in zip(batch.input_ids.flatten().split(batch.lengths), labels.flatten().split(batch.lengths), strict=True)
    ]
    return pack([own])


def one_document(length: int, vocabulary: int, seed: int) -> PackedBatch:
    """One document of random tokens that fills the pack, every position but the last supervised."""
    ids = torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(seed))
    return pack([[(ids, torch.cat([ids[1:], torch.tensor([IGNORE])]))]])


def tricky_batch(
    pack_length: int, packs: int, vocabulary: int, seed: int, lengths: Sequence[int] = TRICKY_LENGTHS
) -> PackedBatch:
    """Random tokens in documents of `lengths`, every third position unsupervised, one document wholly so."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(packs):
        own: list[Document] = []
        for index, length in enumerate(_lengths(pack_length, row, lengths)):
            ids = torch.randint(vocabulary, (length,), generator=generator)
            labels = torch.full_like(ids, IGNORE)
            if index != 4:
                labels[:-1] = ids[1:]
                labels[:-1:3] = IGNORE
            own.append((ids, labels))
        rows.append(own)
    return pack(rows)


def _lengths(pack_length: int, row: int, wanted: Sequence[int]) -> list[int]:
    """The wanted lengths rotated by `row`, as many as fit, then documents of `REST` with the rest."""
    out, left = [], pack_length
    for length in (*wanted[row:], *wanted[:row]):
        if length < left:
            out.append(length)
            left -= length
    while left > REST:
        out.append(REST)
        left -= REST
    return [*out, left]


def memorised(dataset: Dataset) -> list[Document]:
    """Short documents with every position supervised, which the overfit state is trained on.

    Each starts with another token: what follows two documents' common beginning could not be known by heart. Raises
    UserError where no document has two tokens.
    """
    every = [ids for step in range(FAR, FAR + 100) for ids, _ in documents(dataset.micro_batches(step, 1, 1)[0])]
    length = max(2, min(MEMORISED_LENGTH, dataset.pack_length // 2, max(len(ids) for ids in every) - 1))
    found: dict[int, Document] = {}
    for ids in every:
        left = len(ids) - length
        starts = [at for at in range(max(1, left)) if left >= 0 and int(ids[at]) not in found]
        if starts and len(found) < MEMORISED:
            part = ids[starts[len(starts) // 2] :][:length]
            found[int(part[0])] = (part, torch.cat([part[1:], torch.tensor([IGNORE])]))
    if not found:
        raise UserError(f"{dataset.source}: no document has two tokens; the gate needs documents with something to predict")
    return list(found.values())


def memorised_batch(own: Sequence[Document]) -> PackedBatch:
    """All of them in one pack."""
    return pack([list(own)])


def memorised_probes(own: Sequence[Document], count: int, seed: int = 0) -> list[Probe]:
    """Half of the memorised documents, each cut somewhere, in another order for every probe."""
    out, length = [], len(own[0][0])
    for index in range(count):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        order = torch.randperm(len(own), generator=generator)[: max(1, len(own) // 2)].tolist()
        lengths = torch.randint(max(2, length // 2), length + 1, (len(order),), generator=generator).tolist()
        out.append((pack([[cut(*own[i], length) for i, length in zip(order, lengths, strict=True)]]),))
    return out
