"""Packed documents, and the batches of each step as a function of the step alone."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from loop.batch import IGNORE, PackedBatch
from loop.data.cache import digest

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


@dataclass(frozen=True, eq=False)
class Document:
    """One conversation. ids [T] int32; targets [T] int32: the token that position t must predict, or IGNORE."""

    ids: np.ndarray
    targets: np.ndarray
    supervised: int  # targets that are not IGNORE

    @classmethod
    def from_mask(cls, ids: np.ndarray, supervised: np.ndarray) -> Document:
        """ids [T] int32; supervised [T] bool: whether a token is to be learned. The last position predicts nothing."""
        targets = np.full(len(ids), IGNORE, dtype=np.int32)
        targets[:-1] = np.where(supervised[1:], ids[1:], IGNORE)
        return cls(ids, targets, int(supervised[1:].sum()))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def input_ids(self) -> list[int]:
        return self.ids.tolist()

    @property
    def labels(self) -> list[int]:
        return self.targets.tolist()


@dataclass(frozen=True, eq=False)
class Dataset:
    """Documents and the packs they lie in.

    packs: indices of documents, one tuple a pack; the tail of a pack up to `pack_length` is padding. skipped: reason ->
    examples left out. source: the file, or the interpreter whose documentation it is. seed: of the order of packs.
    """

    documents: tuple[Document, ...]
    packs: tuple[tuple[int, ...], ...]
    pack_length: int
    pad_token_id: int
    skipped: Mapping[str, int]
    source: str
    seed: int

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of what a model gets to see: tokens, labels, packs and padding; not of the seed or the file's name."""
        parts = (part for doc in self.documents for part in (doc.ids.tobytes(), doc.targets.tobytes()))
        return digest(f"{self.pack_length} {self.pad_token_id} {self.packs}", *parts)

    def batch(self, pack_indices: Sequence[int]) -> PackedBatch:
        """The packs as one micro-batch of CPU tensors, B = len(pack_indices). Raises ValueError without any."""
        if not len(pack_indices):
            raise ValueError("a batch needs at least one pack")
        shape = (len(pack_indices), self.pack_length)
        ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        labels = np.full(shape, IGNORE, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        boundaries, padding = [0], []
        for row, pack in enumerate(pack_indices):
            offset = 0
            for document in (self.documents[index] for index in self.packs[pack]):
                end = offset + len(document)
                ids[row, offset:end] = document.ids
                labels[row, offset:end] = document.targets
                positions[row, offset:end] = np.arange(len(document))
                boundaries.append(row * self.pack_length + end)
                offset = end
            if offset < self.pack_length:
                positions[row, offset:] = np.arange(self.pack_length - offset)
                padding.append(len(boundaries) - 1)
                boundaries.append((row + 1) * self.pack_length)
        documents = [self.documents[index] for pack in pack_indices for index in self.packs[pack]]
        return PackedBatch(
            input_ids=torch.from_numpy(ids),
            labels=torch.from_numpy(labels),
            position_ids=torch.from_numpy(positions),
            cu_seqlens=torch.tensor(boundaries, dtype=torch.int32),
            real_tokens=sum(map(len, documents)),
            supervised_tokens=sum(document.supervised for document in documents),
            padding=tuple(padding),
        )

    def epoch_order(self, epoch: int) -> list[int]:
        """A shuffle of all packs: a function of the seed and the epoch alone."""
        return list(_shuffled(len(self.packs), self.seed, epoch))

    def micro_batches(self, step: int, grad_accum: int, packs_per_micro_step: int) -> list[PackedBatch]:
        """The `grad_accum` micro-batches of a step that counts from 0: a function of the arguments alone.

        Steps take packs one after the other from epoch 0, 1, 2, ..., so a micro-batch may lie across two epochs.
        """
        if step < 0 or grad_accum < 1 or packs_per_micro_step < 1:
            raise ValueError(f"step {step} must be >= 0; {grad_accum=} and {packs_per_micro_step=} must be >= 1")
        per_step = grad_accum * packs_per_micro_step
        chosen = [self._pack_at(place) for place in range(step * per_step, (step + 1) * per_step)]
        starts = range(0, per_step + 1, packs_per_micro_step)
        return [self.batch(chosen[start:end]) for start, end in pairwise(starts)]

    def _pack_at(self, place: int) -> int:
        epoch, position = divmod(place, len(self.packs))
        return _shuffled(len(self.packs), self.seed, epoch)[position]

    def statistics(self) -> dict[str, Any]:
        """Counts for reports, as JSON can hold them. lengths: quantiles of document lengths in tokens.

        supervised_fraction is of real tokens; padding_fraction and packing_efficiency are of all positions and sum to 1.
        """
        lengths = np.array([len(document) for document in self.documents])
        real, positions = int(lengths.sum()), len(self.packs) * self.pack_length
        supervised = sum(document.supervised for document in self.documents)
        quantiles = np.quantile(lengths, QUANTILES, method="inverted_cdf")
        return {
            "source": self.source,
            "content_hash": self.content_hash,
            "documents": len(self.documents),
            "packs": len(self.packs),
            "pack_length": self.pack_length,
            "positions": positions,
            "real_tokens": real,
            "supervised_tokens": supervised,
            "supervised_fraction": supervised / real,
            "padding_fraction": 1 - real / positions,
            "packing_efficiency": real / positions,
            "fewest_packs": -(-real // self.pack_length),
            "skipped": dict(self.skipped),
            "lengths": {_name(q): int(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
        }


def _name(quantile: float) -> str:
    return {0.0: "min", 1.0: "max"}.get(quantile, f"p{quantile * 100:.0f}")


@lru_cache(maxsize=8)
def _shuffled(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(count))
    # A string seed goes through SHA-512: near seeds and epochs give unrelated orders, on every platform.
    random.Random(f"{seed} {epoch}").shuffle(order)
    return tuple(order)
