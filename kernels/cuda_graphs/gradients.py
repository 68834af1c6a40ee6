"""The optimizer's gradients at addresses that stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from loop.optim import copy_all

Held = tuple[bool, ...]  # which masters have a gradient, in the optimizer's order
Late = dict[Tensor, Tensor]  # gradients that are not added yet, by master, in their parameters' dtype
Pair = tuple[Tensor, Tensor]  # a buffer, and what is to be copied or added there
MOST_CAST = 1 << 26  # numbers that are cast to fp32 before they are added: 256 MiB of the graphs' memory


def deferred(optimizer: Any, places: Mapping[Tensor, Tensor]) -> AbstractContextManager[Late]:
    """Within it the optimizer leaves gradients for `Accumulators.store`. One that can't leave them adds them itself.

    places: the buffers that are there already, by master; what is delivered there need not be copied.
    """
    return optimizer.deferring(places) if hasattr(optimizer, "deferring") else nullcontext({})


class Accumulators:
    """One buffer for every tensor that ever got a gradient, in which all graphs of a run leave theirs.

    A graph for the first micro-step of a step begins without gradients, as the loop does, and its last act is to copy those
    that it made into the buffers; one for a later micro-step begins with the buffers and adds in place. Beginning with zeros
    instead would change bits: 0 + -0 is 0. Narrow gradients wait for the end of backward, since hundreds of small casts and
    additions take longer than their bytes do.
    """

    def __init__(self, masters: Mapping[str, Tensor]) -> None:
        self.masters = tuple(masters.values())
        self.buffers: dict[Tensor, Tensor] = {}  # by master

    def held(self) -> Held:
        return tuple(master.grad is not None for master in self.masters)

    def settle(self) -> None:
        """Moves gradients that lie elsewhere, because a micro-step ran without a graph, into their buffers."""
        for master in self._with_gradient():
            buffer = self._buffer(master)
            if master.grad is not buffer:
                buffer.copy_(master.grad)
                master.grad = buffer

    def start(self, held: Held) -> None:
        """The gradients that a micro-step begins with: the buffers, or none."""
        for master, has in zip(self.masters, held, strict=True):
            master.grad = self.buffers[master] if has else None

    def allocate(self, waiting: Late) -> None:
        """Buffers for whatever has a gradient now, or will have."""
        for master in self.masters:
            if master.grad is not None or master in waiting:
                self._buffer(master)

    def store(self, waiting: Late) -> None:
        """Brings gradients that lie elsewhere, or wait, into their buffers, which are there already. Part of the graph.

        Rounds nothing, and adds in fp32 and in the order in which the optimizer would: what it has got already comes first.
        """
        copied, added = [], []
        for master in self.masters:
            own, late, buffer = master.grad, waiting.pop(master, None), self.buffers.get(master)
            if own is not None and own is not buffer:
                copied.append((buffer, own))
            if late is not None:
                (copied if own is None else added).append((buffer, late))
            if own is not None or late is not None:
                master.grad = buffer
        copy_all(copied)
        _add(added)

    def publish(self, given: Held) -> None:
        """After a replay: the buffers that it wrote are the gradients."""
        for master, has in zip(self.masters, given, strict=True):
            if has:
                master.grad = self.buffers[master]

    def copies(self, held: Held) -> list[Tensor]:
        """What the buffers of `held` gradients hold, for `restore`."""
        return [self.buffers[master].clone() for master, has in zip(self.masters, held, strict=True) if has]

    def restore(self, held: Held, copies: list[Tensor]) -> None:
        self.start(held)
        for master, copy in zip(self._with_gradient(), copies, strict=True):
            master.grad.copy_(copy)

    def _with_gradient(self) -> list[Tensor]:
        return [master for master in self.masters if master.grad is not None]

    def _buffer(self, master: Tensor) -> Tensor:
        if master not in self.buffers:
            self.buffers[master] = torch.empty_like(master, requires_grad=False)
        return self.buffers[master]


def _add(pairs: list[Pair]) -> None:
    """As `copy_all`; cast first, since PyTorch has no addition of lists of two dtypes in few launches."""
    for some in _portions(pairs):
        buffers, gradients = zip(*some, strict=True)
        wide = [torch.empty_like(buffer) for buffer in buffers]
        copy_all(zip(wide, gradients, strict=True))
        torch._foreach_add_(buffers, wide)


def _portions(pairs: list[Pair]) -> Iterator[list[Pair]]:
    """The pairs in turn, up to `MOST_CAST` numbers at a time, or a single larger one."""
    portion, size = [], 0
    for pair in pairs:
        if portion and size + pair[0].numel() > MOST_CAST:
            yield portion
            portion, size = [], 0
        portion.append(pair)
        size += pair[0].numel()
    if portion:
        yield portion
