"""Projections of one tensor, computed together at the first of the calls that ask for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

# Projections that the models' attention, MLP and gated-delta layers call with one and the same tensor, in turn. That they do
# is what makes sharing pay; where they do not, every call is computed for what it is given.
KINDS = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"}),
)


class Member(Protocol):
    """A module that makes one of the outputs. tensors: what it is made of besides x; the first is its weight [out, in].
    drops: whether it draws random numbers, so that it has to be computed when it is called. alone(x): its own output."""

    shared: SharedInput | None
    tensors: tuple[Tensor, ...]
    drops: bool

    def alone(self, x: Tensor) -> Tensor: ...


class SharedInput:
    """Members that are called one after another with the same tensor, and are computed at the first of these calls.

    What the others are to be given is kept until they ask, for the very same tensor, unchanged, in the same mode and with
    the same weights; anything else, a member that asks twice included, is computed anew. Once all have asked nothing is
    kept, so in a model that calls every member no graph outlives the layer's forward.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = tuple(members)
        for member in self.members:
            member.shared = self
        self.input: Tensor | None
        self.key: tuple | None
        self.waiting: dict[Member, Tensor]
        self._forget()

    def together(self, x: Tensor) -> Sequence[Tensor]:
        """What every member makes of x, in their order."""
        raise NotImplementedError

    def output(self, member: Member, x: Tensor) -> Tensor:
        """What `member` makes of x."""
        if any(other.drops for other in self.members) or x.is_inference():
            return member.alone(x)
        key = self._key(x)
        if self.input is not x or self.key != key or member not in self.waiting:
            self._forget()  # first: what comes may need the memory, or fail
            outputs = self.together(x)
            self.input, self.key, self.waiting = x, key, dict(zip(self.members, outputs, strict=True))
        own = self.waiting.pop(member)
        if not self.waiting:
            self._forget()
        return own

    def _forget(self) -> None:
        self.input, self.key, self.waiting = None, None, {}

    def _key(self, x: Tensor) -> tuple:
        """What must not change between the calls: gradients on or off, and the contents of x and of every weight."""
        held = (tensor for member in self.members for tensor in member.tensors)
        return torch.is_grad_enabled(), x._version, *((id(tensor), tensor._version) for tensor in held)


def kind(attribute: str) -> frozenset[str] | None:
    """Which of `KINDS` a projection of that name belongs to."""
    return next((kind for kind in KINDS if attribute in kind), None)


def groups(members: Iterable[tuple[str, Member]]) -> Iterator[list[str]]:
    """Names of at least two projections each that hang on one parent and share its input, in the order given."""
    found: dict[tuple, list[str]] = {}
    for name, member in members:
        parent, _, attribute = name.rpartition(".")
        weight = member.tensors[0]
        if kind(attribute) is not None:
            found.setdefault((parent, kind(attribute), weight.shape[1], weight.dtype), []).append(name)
    return (names for names in found.values() if len(names) > 1)
