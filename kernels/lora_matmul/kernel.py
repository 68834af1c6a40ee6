"""LoRA projections of one input as one autograd node: base products, adapters, and the backward of all of them.

For projections i of one x [T, in], with W_i [out_i, in], A_i [rank_i, in], B_i [out_i, rank_i] and scaling s_i:

    h = x [A_1; A_2; ...]^T             one skinny product, [T, ranks]
    y_i = x W_i^T + s_i h_i B_i^T       the second product is added inside the kernel that computes it
    g_i = s_i dy_i B_i                  skinny, [T, rank_i]
    dx = sum_i dy_i W_i + [g_1 g_2 ...] [A_1; A_2; ...]      each product is added inside its kernel
    dA = [g_1 g_2 ...]^T x              one skinny product for all
    dB_i = s_i dy_i^T h_i

In fp32 each projection has skinny products of its own. B A [out, in] is never formed; the frozen W gets no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NARROW = (torch.bfloat16, torch.float16)


def lora_matmul(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scalings: Sequence[float],
    adapted: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """x W_i^T + bias_i + s_i (adapted A_i^T) B_i^T for every i.

    x [..., in]; weights [out_i, in] and biases [out_i] or None, both frozen; a [rank_i, in]; b [out_i, rank_i]; one
    floating dtype and device, any strides. adapted [..., in]: what the adapters see instead of x, an x with dropout.
    Returns contiguous [..., out_i]. Differentiable once in x, adapted, a and b; weights and biases get no gradient.
    """
    rows = _rows(x)
    seen = None if adapted is None else _rows(adapted)
    outputs = _LoraMatmul.apply(tuple(scalings), rows, seen, *weights, *biases, *a, *b)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


class _LoraMatmul(torch.autograd.Function):
    """On rows: x and adapted [T, in], outputs [T, out_i]."""

    @staticmethod
    def forward(ctx, scalings: tuple[float, ...], x: Tensor, adapted: Tensor | None, *rest: Tensor | None):
        weights, biases, a, b = _in_four(rest)
        seen, h = x if adapted is None else adapted, []
        for group in _bundles(a, x.dtype):
            h += (seen @ _joined(group, dim=0).t()).split([len(matrix) for matrix in group], dim=1)  # [T, rank_i] each
        outputs = []
        for weight, bias, own_h, own_b, scaling in zip(weights, biases, h, b, scalings, strict=True):
            outputs.append(F.linear(x, weight, bias).addmm_(own_h, own_b.t(), alpha=scaling))
        ctx.scalings = scalings
        ctx.save_for_backward(x, adapted, *weights, *a, *b, *h)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dy: Tensor | None):
        x, adapted, *rest = ctx.saved_tensors
        _, needs_x, needs_adapted, *needs = ctx.needs_input_grad
        _, _, needs_a, needs_b = _in_four(needs)
        parts = zip(dy, *_in_four(rest), ctx.scalings, needs_a, needs_b, strict=True)
        used = [_Part(index, *part) for index, part in enumerate(parts) if part[0] is not None]
        seen, dx, d_adapted, da, db = x if adapted is None else adapted, None, None, [None] * len(dy), [None] * len(dy)
        if needs_x:
            for part in used:
                dx = _plus(dx, part.dy, part.weight)
        for group in _bundles(used, x.dtype):
            g = _joined([part.g() for part in group], dim=1)  # [T, ranks]
            a = _joined([part.a for part in group], dim=0)
            if adapted is None:
                dx = _plus(dx, g, a) if needs_x else None
            elif needs_adapted:
                d_adapted = _plus(d_adapted, g, a)
            if any(part.needs_a for part in group):
                for part, own in zip(group, (g.t() @ seen).split([len(part.a) for part in group]), strict=True):
                    da[part.index] = own
        for part in used:
            db[part.index] = part.db() if part.needs_b else None
        return None, dx, d_adapted, *[None] * (2 * len(dy)), *da, *db


class _Part(NamedTuple):
    """One projection in the backward: dy [T, out], weight [out, in], a [rank, in], b [out, rank], h [T, rank]."""

    index: int
    dy: Tensor
    weight: Tensor
    a: Tensor
    b: Tensor
    h: Tensor
    scaling: float
    needs_a: bool
    needs_b: bool

    def g(self) -> Tensor:
        """s dy B, [T, rank]. With beta 0 the first argument gives the shape alone."""
        return torch.addmm(self.h, self.dy, self.b, beta=0, alpha=self.scaling)

    def db(self) -> Tensor:
        return torch.addmm(self.b, self.dy.t(), self.h, beta=0, alpha=self.scaling)


def _bundles(items: Sequence, dtype: torch.dtype) -> list[Sequence]:
    """Which adapters share their skinny products: all, but in fp32 each has its own.

    There the length of a sum and the order in which a BLAS takes it show in the result; in bf16 they drown in its rounding.
    """
    return [items] if items and dtype in NARROW else [[item] for item in items]


def _plus(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """left @ right, added to total in place where there is one."""
    return left @ right if total is None else total.addmm_(left, right)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """A copy made anew at every call: small beside x, and it need not follow the parameters."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim)


def _in_four(items: Sequence) -> list[Sequence]:
    """Four equal parts: what belongs to the weights, the biases, A and B; or in backward to the weights, A, B and h."""
    count = len(items) // 4
    return [items[start : start + count] for start in range(0, len(items), count)]


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class FusedLora(nn.Module):
    """One adapted projection, `base(x) + s B(A(dropout(x)))`, alone or as a member of a `SharedInput`.

    Has the parts by which the loop knows an adapter, around the parameters of the layer that it replaces. x [..., in] ->
    [..., out], in the dtype of the weights.
    """

    def __init__(self, base: nn.Linear, a: nn.Parameter, b: nn.Parameter, scaling: float, dropout: float) -> None:
        super().__init__()
        if not a.dtype == b.dtype == base.weight.dtype:
            raise ValueError(f"adapter dtypes {a.dtype}, {b.dtype} differ from the base's {base.weight.dtype}")
        self.base_layer = base
        self.lora_A, self.lora_B = _around(a), _around(b)
        self.scaling, self.dropout = scaling, dropout
        self.shared: SharedInput | None = None

    @property
    def drops(self) -> bool:
        return self.training and self.dropout > 0

    def forward(self, x: Tensor) -> Tensor:
        if self.drops:  # its own mask, drawn when it is called, as PEFT does
            return _together([self], x, F.dropout(x, self.dropout))[0]
        return _together([self], x)[0] if self.shared is None else self.shared.output(self, x)


class SharedInput:
    """Projections that are called one after another with the same tensor, and are computed at the first of these calls.

    What the others are to be given is kept until they ask, for the very same tensor, unchanged, in the same mode and with
    the same weights; anything else, a member that asks twice included, is computed anew. Once all have asked nothing is
    kept, so in a model that calls every member no graph outlives the layer's forward.
    """

    def __init__(self, members: Sequence[FusedLora]) -> None:
        self.members = tuple(members)
        for member in self.members:
            member.shared = self
        self.input: Tensor | None
        self.key: tuple | None
        self.waiting: dict[FusedLora, Tensor]
        self._forget()

    def output(self, member: FusedLora, x: Tensor) -> Tensor:
        """What `member` makes of x."""
        if any(other.drops for other in self.members) or x.is_inference():
            return _together([member], x)[0]
        key = self._key(x)
        if self.input is not x or self.key != key or member not in self.waiting:
            self._forget()  # first: what comes may need the memory, or fail
            outputs = _together(self.members, x)
            self.input, self.key, self.waiting = x, key, dict(zip(self.members, outputs, strict=True))
        own = self.waiting.pop(member)
        if not self.waiting:
            self._forget()
        return own

    def _forget(self) -> None:
        self.input, self.key, self.waiting = None, None, {}

    def _key(self, x: Tensor) -> tuple:
        """What must not change between the calls: gradients on or off, and the contents of x and of every weight."""
        held = (weight for member in self.members for weight in _tensors_of(member))
        return torch.is_grad_enabled(), x._version, *((id(weight), weight._version) for weight in held)


def _tensors_of(member: FusedLora) -> tuple[Tensor, ...]:
    base = member.base_layer
    own = (base.weight, member.lora_A.weight, member.lora_B.weight)
    return own if base.bias is None else (*own, base.bias)


def _together(members: Sequence[FusedLora], x: Tensor, adapted: Tensor | None = None) -> tuple[Tensor, ...]:
    return lora_matmul(
        x,
        [member.base_layer.weight for member in members],
        [member.base_layer.bias for member in members],
        [member.lora_A.weight for member in members],
        [member.lora_B.weight for member in members],
        [member.scaling for member in members],
        adapted,
    )


def _around(weight: nn.Parameter) -> nn.Linear:
    """A Linear that holds an existing parameter, whose name so ends in `lora_A.weight` or `lora_B.weight`."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    return linear
