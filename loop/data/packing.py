"""Best-fit-decreasing bin packing of document lengths.

Source: D. S. Johnson, "Near-optimal bin packing algorithms", MIT, 1973; at most 11/9 of the optimal number of bins + 1.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack_best_fit_decreasing(lengths: Sequence[int], pack_length: int) -> tuple[tuple[int, ...], ...]:
    """Indices of documents, one tuple a pack; each document is in exactly one pack and no pack is over `pack_length`.

    The longest document goes first, each into the fullest pack that still has room for it; ties go to the lower index,
    so the result is a function of the arguments alone. O(n log n): packs are kept by their free space, and there are at
    most `pack_length` different ones. Raises ValueError for a length below 1 or over `pack_length`.
    """
    if any(not 1 <= length <= pack_length for length in lengths):
        raise ValueError(f"every length must be between 1 and pack_length {pack_length}")
    packs: list[list[int]] = []
    free_sizes: list[int] = []  # sorted, without repeats
    packs_by_free: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
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
