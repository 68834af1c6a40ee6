"""What a captured micro-step reads, at addresses that stay: the graph follows whatever is copied there.

A graph has the shapes of one batch baked in, so a batch gets its graph by a signature: its shape, and of its documents what
the run's layers and loss head ask for and no more. Each may ask for

    rows     the supervised positions. Filled up with an ignored one to a multiple of a step: no loss, no gradient.
    chunks   boundaries and chunks of 64 positions. Filled up with documents of no tokens at the end, and with chunks of the
             last of them, in which every position is masked.
    groups   documents as rows of about the same length. Nothing can be filled up: how many of which length is the signature.

Where each position's document begins and ends is read off the position ids, and asks for nothing. Whoever asks for document
lengths on the host gets `CannotCapture`: the answer would be that of the batch captured.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import torch
import torch.nn.functional as F

from loop.batch import PackedBatch
from loop.delta_net import CHUNK, Pack

ROWS, CHUNKS, GROUPS = "rows", "chunks", "groups"
ROW_STEPS, LEAST_ROW_STEP = 8, 64  # a step is at most an eighth of the positions: finer packs into more graphs
CHUNK_STEPS, LEAST_CHUNK_STEP = 4, 4  # and at most a fourth of the chunks that positions without boundaries would have


class CannotCapture(Exception):
    """Why a micro-step can't become a graph, in words."""


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def _step(limit: int, least: int) -> int:
    """The largest power of two up to `limit`, and at least `least`."""
    return max(least, 1 << max(limit, 1).bit_length() - 1)


def row_count(supervised: int, positions: int) -> int:
    """How many rows the loss head is given; never more than there are positions."""
    return min(_up(supervised, _step(positions // ROW_STEPS, LEAST_ROW_STEP)), positions)


def chunks_in(lengths: tuple[int, ...]) -> int:
    return sum(-(-length // CHUNK) for length in lengths)


def chunk_count(lengths: tuple[int, ...]) -> int:
    """How many chunks a graph has for documents of these lengths, and so how many documents: none is without a chunk."""
    return _up(chunks_in(lengths), _step(sum(lengths) // CHUNK // CHUNK_STEPS, LEAST_CHUNK_STEP))


def signature(batch: PackedBatch, asked: frozenset[str]) -> tuple:
    """What two batches must share to be computed by one graph. asked: which of ROWS, CHUNKS, GROUPS the run needs."""
    parts: list = [tuple(batch.input_ids.shape)]
    if ROWS in asked:
        parts.append(row_count(len(batch.supervised_positions), batch.positions))
    if CHUNKS in asked:
        parts.append(chunk_count(batch.lengths))
    if GROUPS in asked:
        parts.append(tuple(sorted(Counter(_up(length, CHUNK) for length in batch.lengths).items())))
    return tuple(parts)


def padded_rows(batch: PackedBatch) -> torch.Tensor:
    """The supervised positions, then the last position of all, whose label is always ignored; int64 [row_count]."""
    rows = batch.supervised_positions
    return F.pad(rows, (0, row_count(len(rows), batch.positions) - len(rows)), value=batch.positions - 1)


def with_padded_rows(batch: PackedBatch) -> PackedBatch:
    """The same batch, whose layers and loss head compute the rows that they would compute in a graph."""
    padded = dataclasses.replace(batch)
    padded.__dict__["lengths"] = batch.lengths
    padded.__dict__["supervised_positions"] = padded_rows(batch)
    return padded


class Inputs:
    """The static tensors of one graph, and `asked`: what of its documents was needed so far.

    What is asked for is made from the batch that was filled in last, in the warm-up at the latest.
    """

    def __init__(self, batch: PackedBatch) -> None:
        self.asked: set[str] = set()
        self.tokens = [x.clone() for x in (batch.input_ids, batch.labels, batch.position_ids)]  # each [B, L] int64
        self.scale = torch.empty((), dtype=torch.float32, device=batch.input_ids.device)
        self.rows = self.bounds = self.documents = None
        self.current = batch

    def fill(self, batch: PackedBatch, step_supervised_tokens: int) -> None:
        """Copies a batch of this signature in; waits for nothing but the batch's own lengths, which it brings along."""
        self.current = batch
        for static, own in zip(self.tokens, (batch.input_ids, batch.labels, batch.position_ids), strict=True):
            static.copy_(own)
        # As the loop divides, in fp32; what is filled in is a number, so nothing is copied from the host.
        self.scale.fill_(float(torch.ones(()) / max(step_supervised_tokens, 1)))
        if self.rows is not None:
            self.rows.copy_(padded_rows(batch))
        if self.bounds is not None:
            self.bounds.copy_(self._padded_bounds())
        if self.documents is not None:
            fresh = Pack.of(batch)
            for static, own in zip((*self.documents.groups, self.documents.back), (*fresh.groups, fresh.back), strict=True):
                static.copy_(own)

    def batch(self) -> StaticBatch:
        return StaticBatch(self)

    def pack(self) -> StaticPack:
        return StaticPack(self)

    def ask_rows(self) -> torch.Tensor:
        self.asked.add(ROWS)
        if self.rows is None:
            self.rows = padded_rows(self.current)
        return self.rows

    def ask_bounds(self) -> torch.Tensor:
        self.asked.add(CHUNKS)
        if self.bounds is None:
            self.bounds = self._padded_bounds()
        return self.bounds

    def ask_documents(self) -> Pack:
        self.asked.add(GROUPS)
        if self.documents is None:
            self.documents = Pack.of(self.current)
            self.documents.back  # noqa: B018  # makes groups and back
        return self.documents

    def _padded_bounds(self) -> torch.Tensor:
        """cu_seqlens, then the end over and over; int32 [chunk_count + 1]."""
        bounds, lengths = self.current.cu_seqlens, self.current.lengths
        missing = chunk_count(lengths) - len(lengths)
        return F.pad(bounds, (0, missing), value=self.current.positions)


class StaticBatch(PackedBatch):
    """The batch that a graph computes: PackedBatch's tensors at fixed addresses, and no counts on the host."""

    def __init__(self, inputs: Inputs) -> None:
        names = ("input_ids", "labels", "position_ids")
        self.__dict__.update(zip(names, inputs.tokens, strict=True), inputs=inputs)

    @property
    def cu_seqlens(self) -> torch.Tensor:
        return self.__dict__["inputs"].ask_bounds()

    @property
    def supervised_positions(self) -> torch.Tensor:
        return self.__dict__["inputs"].ask_rows()

    @property
    def lengths(self) -> tuple[int, ...]:
        raise CannotCapture("the loss head reads document lengths on the host")

    @property
    def real_tokens(self) -> int:
        raise CannotCapture("the loss head reads the number of real tokens on the host")

    @property
    def supervised_tokens(self) -> int:
        raise CannotCapture("the loss head reads the number of supervised tokens on the host")


class StaticPack(Pack):
    """The boundaries that a graph's layers get, as `Pack`. A new one for each forward: some libraries keep what they made of
    a `cu_seqlens` for as long as they are given that very object, and in a graph it must be made anew.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.__dict__["inputs"] = inputs

    @property
    def cu_seqlens(self) -> torch.Tensor:
        made = self.__dict__
        if "bounds" not in made:
            made["bounds"] = made["inputs"].ask_bounds().view(-1)
        return made["bounds"]

    @property
    def rows(self) -> torch.Tensor:
        return self.__dict__["inputs"].ask_rows()

    @property
    def chunk_indices(self) -> torch.Tensor:
        made = self.__dict__
        if "chunks" not in made:
            made["chunks"] = chunk_indices(self.cu_seqlens)
        return made["chunks"]

    @property
    def starts(self) -> torch.Tensor:
        """From position ids, which begin anew with every document: nothing needs to be known of the documents."""
        made = self.__dict__
        if "starts" not in made:
            positions = made["inputs"].tokens[2].flatten()
            made["starts"] = (torch.arange(len(positions), device=positions.device) - positions).to(torch.int32)
        return made["starts"]

    @property
    def ends(self) -> torch.Tensor:
        """From `starts`, which are in order: so many are no greater than a position's own."""
        made = self.__dict__
        if "ends" not in made:
            made["ends"] = torch.searchsorted(self.starts, self.starts, right=True, out_int32=True)
        return made["ends"]

    @property
    def groups(self) -> tuple[torch.Tensor, ...]:
        return self.__dict__["inputs"].ask_documents().groups

    @property
    def back(self) -> torch.Tensor:
        return self.__dict__["inputs"].ask_documents().back

    @property
    def lengths(self) -> tuple[int, ...]:
        raise CannotCapture("a layer reads document lengths on the host")

    @property
    def cu_seqlens_cpu(self) -> torch.Tensor:
        raise CannotCapture("a layer reads document boundaries on the host")


def chunk_indices(bounds: torch.Tensor) -> torch.Tensor:
    """bounds [N + 1] -> document and place in it of N chunks, [N, 2] in its dtype, computed where the bounds are.

    Documents without tokens are at the end alone. N is at least the number of chunks; those beyond are the first of the last
    document, which then has no tokens, since no other document is without a chunk.
    """
    N = len(bounds) - 1
    chunks = (bounds[1:] - bounds[:-1] + (CHUNK - 1)) // CHUNK  # [N]
    ends = chunks.cumsum(0)
    slots = torch.arange(N, device=bounds.device)
    document = torch.searchsorted(ends, slots, right=True).clamp(max=N - 1)
    place = (slots - (ends - chunks).index_select(0, document)) * (slots < ends[-1:])
    return torch.stack([document, place], dim=1).to(bounds.dtype)
