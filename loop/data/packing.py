"""Best-fit bin packing of document lengths, the longest first or in a shuffled order.

Source: D. S. Johnson, "Near-optimal bin packing algorithms", MIT, 1973; at most 11/9 of the optimal number of bins + 1 the
longest first, 17/10 in any order.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence


def pack_best_fit_decreasing(lengths: Sequence[int], pack_length: int) -> tuple[tuple[int, ...], ...]:
    """Indices of documents, one tuple a pack; each document is in exactly one pack and no pack is over `pack_length`.

    The longest document goes first; ties go to the lower index. So a pack holds documents of about the same length. Raises
    ValueError for a length below 1 or over `pack_length`.
    """
    return _best_fit(lengths, pack_length, sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)))


def pack_best_fit_shuffled(lengths: Sequence[int], pack_length: int) -> tuple[tuple[int, ...], ...]:
    """As `pack_best_fit_decreasing`, but documents come in a shuffled order, the same one for the same number of them: a
    pack holds long and short ones, as a batch of random documents does."""
    order = list(range(len(lengths)))
    random.Random("shuffled").shuffle(order)
    return _best_fit(lengths, pack_length, order)


def _best_fit(lengths: Sequence[int], pack_length: int, order: Iterable[int]) -> tuple[tuple[int, ...], ...]:
    """Each document, in this order, goes into the fullest pack that still has room for it: a function of the arguments
    alone. O(n log n): packs are kept by their free space, and there are at most `pack_length` different ones."""
    if any(not 1 <= length <= pack_length for length in lengths):
        raise ValueError(f"every length must be between 1 and pack_length {pack_length}")
    packs: list[list[int]] = []
    free_sizes: list[int] = []  # sorted, without repeats
    packs_by_free: dict[int, list[int]] = {}
    for index in order:
        slot = bisect_left(free_sizes, lengths[index])
        if slot == len(free_sizes):
            free, pack = pack_length, len(packs)
            packs.append([])
        else:
            free = free_sizes[slot]
            pack = packs_by_free[free].pop()
            if not packs_by_free[free]:
                del packs_by_free[free], free_sizes[slot]
        packs[pack].append(index)
        left = free - lengths[index]
        if left in packs_by_free:
            packs_by_free[left].append(pack)
        elif left > 0:
            packs_by_free[left] = [pack]
            insort(free_sizes, left)
    return tuple(tuple(pack) for pack in packs)
