"""The optimizer's gradients at addresses that stay."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Held = tuple[bool, ...]  # which masters have a gradient, in the optimizer's order


class Accumulators:
    """One buffer for every tensor that ever got a gradient, in which all graphs of a run leave theirs.

    A graph for the first micro-step of a step begins without gradients, as the loop does, and its last act is to copy those
    that it made into the buffers; one for a later micro-step begins with the buffers and adds in place. Beginning with zeros
    instead would change bits: 0 + -0 is 0.
    """

    def __init__(self, masters: Mapping[str, Tensor]) -> None:
        self.masters = dict(masters)
        self.buffers: dict[str, Tensor] = {}

    def held(self) -> Held:
        return tuple(master.grad is not None for master in self.masters.values())

    def settle(self) -> None:
        """Moves gradients that lie elsewhere, because a micro-step ran without a graph, into their buffers."""
        for name, master in self._with_gradient():
            buffer = self._buffer(name)
            if master.grad is not buffer:
                buffer.copy_(master.grad)
                master.grad = buffer

    def start(self, held: Held) -> None:
        """The gradients that a micro-step begins with: the buffers, or none."""
        for (name, master), has in zip(self.masters.items(), held, strict=True):
            master.grad = self.buffers[name] if has else None

    def allocate(self) -> None:
        """Buffers for whatever has a gradient now."""
        for name, _ in self._with_gradient():
            self._buffer(name)

    def store(self) -> None:
        """Copies gradients that lie elsewhere into their buffers, which are there already. Part of the graph."""
        fresh = [(self.buffers[name], m.grad) for name, m in self._with_gradient() if m.grad is not self.buffers[name]]
        if fresh:
            targets, sources = zip(*fresh, strict=True)
            torch._foreach_copy_(targets, sources)

    def publish(self, given: Held) -> None:
        """After a replay: the buffers that it wrote are the gradients."""
        for (name, master), has in zip(self.masters.items(), given, strict=True):
            if has:
                master.grad = self.buffers[name]

    def copies(self, held: Held) -> list[Tensor]:
        """What the buffers of `held` gradients hold, for `restore`."""
        return [self.buffers[name].clone() for name, has in zip(self.masters, held, strict=True) if has]

    def restore(self, held: Held, copies: list[Tensor]) -> None:
        self.start(held)
        for (_, master), copy in zip(self._with_gradient(), copies, strict=True):
            master.grad.copy_(copy)

    def _with_gradient(self) -> list[tuple[str, Tensor]]:
        return [(name, master) for name, master in self.masters.items() if master.grad is not None]

    def _buffer(self, name: str) -> Tensor:
        if name not in self.buffers:
            self.buffers[name] = torch.empty_like(self.masters[name], requires_grad=False)
        return self.buffers[name]
