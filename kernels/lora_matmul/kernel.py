"""LoRA projections of one input as one autograd node: base products, adapters, and the backward of all of them.

For projections i of one x [T, in], with W_i [out_i, in], A_i [rank_i, in], B_i [out_i, rank_i] and scaling s_i:

    h = x [A_1; A_2; ...]^T             one skinny product, [T, ranks]
    y_i = x W_i^T + s_i h_i B_i^T       the second product is added inside the kernel that computes it
    g_i = s_i dy_i B_i                  skinny, [T, rank_i]
    dx = sum_i dy_i W_i + [g_1 g_2 ...] [A_1; A_2; ...]      each product is added inside its kernel
    dA = [g_1 g_2 ...]^T x              one skinny product for all
    dB_i = s_i dy_i^T h_i

Narrow frozen projections P_j [out_j, in] of the same x, which have no adapter, are more rows of A to h and dx: x P_j^T is a
part of h, dy_j one of g. In fp32 each projection has skinny products of its own. B A [out, in] is never formed; the frozen W
and P get no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kernels import shared_input

NARROW = (torch.bfloat16, torch.float16)


def lora_matmul(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scalings: Sequence[float],
    adapted: Tensor | None = None,
    plain: Sequence[Tensor] = (),
) -> tuple[Tensor, ...]:
    """x W_i^T + bias_i + s_i (adapted A_i^T) B_i^T for every i, then x P_j^T for every P_j of plain.

    x [..., in]; weights [out_i, in] and biases [out_i] or None, both frozen; a [rank_i, in]; b [out_i, rank_i]; one
    floating dtype and device, any strides. adapted [..., in]: what the adapters see instead of x, an x with dropout. plain:
    weights [out_j, in] of frozen projections without adapters, small beside x. Returns contiguous [..., out_i] and
    [..., out_j]. Differentiable once in x, adapted, a and b; weights, biases and plain get no gradient. Raises ValueError
    for adapted and plain together.
    """
    if plain and adapted is not None:
        raise ValueError("lora_matmul: plain projections see x, which adapters with an input of their own do not")
    rows = _rows(x)
    seen = None if adapted is None else _rows(adapted)
    outputs = _LoraMatmul.apply(tuple(scalings), rows, seen, *weights, *biases, *a, *b, *plain)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


class _LoraMatmul(torch.autograd.Function):
    """On rows: x and adapted [T, in], outputs [T, out_i] and [T, out_j]."""

    @staticmethod
    def forward(ctx, scalings: tuple[float, ...], x: Tensor, adapted: Tensor | None, *rest: Tensor | None):
        weights, biases, a, b, plain = _in_five(rest, len(scalings))
        h = _skinny(x if adapted is None else adapted, [*a, *plain])
        h, narrow = h[: len(a)], h[len(a) :]
        outputs = [_output(x, *part) for part in zip(weights, biases, h, b, scalings, strict=True)]
        ctx.scalings = scalings
        ctx.save_for_backward(x, adapted, *weights, *a, *b, *h, *plain)
        ctx.set_materialize_grads(False)
        return *outputs, *(y.contiguous() for y in narrow)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dy: Tensor | None):
        count = len(ctx.scalings)
        x, adapted, *rest = ctx.saved_tensors
        _, needs_x, needs_adapted, *needs = ctx.needs_input_grad
        *held, plain = _in_five(rest, count)
        _, _, needs_a, needs_b, _ = _in_five(needs, count)
        parts = zip(dy[:count], *held, ctx.scalings, needs_a, needs_b, strict=True)
        used = [_Part(index, *part) for index, part in enumerate(parts) if part[0] is not None]
        narrow = [_Narrow(*part) for part in zip(dy[count:], plain, strict=True) if needs_x and part[0] is not None]
        seen, dx, d_adapted, da, db = x if adapted is None else adapted, None, None, [None] * count, [None] * count
        if needs_x:
            for part in used:
                dx = _plus(dx, part.dy, part.weight)
        for group in _bundles([*used, *narrow], x.dtype):
            g = _joined([part.g() for part in group], dim=1)  # [T, ranks and narrow outputs]
            a = _joined([part.a for part in group], dim=0)
            if adapted is None:
                dx = _plus(dx, g, a) if needs_x else None
            elif needs_adapted:
                d_adapted = _plus(d_adapted, g, a)
            for part, own in _gradients_of_a([part for part in group if isinstance(part, _Part)], g, seen):
                da[part.index] = own
        for part in used:
            db[part.index] = part.db() if part.needs_b else None
        return None, dx, d_adapted, *[None] * (2 * count), *da, *db, *[None] * len(plain)


def _output(x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, b: Tensor, scaling: float) -> Tensor:
    """x W^T + bias + s h B^T, the base rounded before the adapter's product is added: that is PEFT's order.

    The other order reads the output once less, but it is another training run. What is below half an ulp of the base's
    output rounds away here as in PEFT, which early in a run is most of what an adapter does.
    """
    return F.linear(x, weight, bias).addmm_(h, b.t(), alpha=scaling)


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


class _Narrow(NamedTuple):
    """A projection without an adapter in the backward: dy [T, out], and its weight [out, in] where others have a."""

    dy: Tensor
    a: Tensor

    def g(self) -> Tensor:
        return self.dy


def _gradients_of_a(parts: Sequence[_Part], g: Tensor, seen: Tensor) -> list[tuple[_Part, Tensor]]:
    """dA of each part, whose g are the first columns of the given one; of none where nobody needs it."""
    if not any(part.needs_a for part in parts):
        return []
    ranks = [len(part.a) for part in parts]
    return list(zip(parts, (g[:, : sum(ranks)].t() @ seen).split(ranks), strict=True))


def _skinny(seen: Tensor, matrices: Sequence[Tensor]) -> list[Tensor]:
    """seen [T, in] times each of the matrices [n_i, in], transposed: [T, n_i]."""
    products = []
    for group in _bundles(matrices, seen.dtype):
        product = seen @ _joined(group, dim=0).t()
        products += product.split([len(matrix) for matrix in group], dim=1) if len(group) > 1 else [product]
    return products


def _bundles(items: Sequence, dtype: torch.dtype) -> list[Sequence]:
    """Which adapters and narrow projections share their skinny products: all, but in fp32 each has its own.

    There the length of a sum and the order in which a BLAS takes it show in the result; in bf16 they drown in its rounding.
    """
    return [items] if items and dtype in NARROW else [[item] for item in items]


def _plus(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """left @ right, added to total in place where there is one."""
    return left @ right if total is None else total.addmm_(left, right)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """A copy made anew at every call: small beside x, and it need not follow the parameters."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim)


def _in_five(items: Sequence, count: int) -> list[Sequence]:
    """What belongs to the weights, the biases, A and B (or in backward to the weights, A, B and h), `count` each; and to the
    narrow projections."""
    return [*(items[start : start + count] for start in range(0, 4 * count, count)), items[4 * count :]]


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

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the output is made of besides x."""
        base = self.base_layer
        own = (base.weight, self.lora_A.weight, self.lora_B.weight)
        return own if base.bias is None else (*own, base.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.alone(x) if self.drops or self.shared is None else self.shared.output(self, x)

    def alone(self, x: Tensor) -> Tensor:
        """A node of its own; its mask, if it drops, is drawn here, when it is called, as PEFT does."""
        return _together([self], [], x, F.dropout(x, self.dropout) if self.drops else None)[0]


class SharingLinear(nn.Linear):
    """A narrow frozen projection without an adapter and without a bias, as a member of a `SharedInput`: x [..., in] ->
    [..., out]."""

    drops = False

    def __init__(self, original: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(original.__dict__)  # the parameter and plain attributes alike: names stay
        self.shared: SharedInput | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.weight,)

    def forward(self, x: Tensor) -> Tensor:
        return self.alone(x) if self.shared is None else self.shared.output(self, x)

    def alone(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


Member = FusedLora | SharingLinear


class SharedInput(shared_input.SharedInput):
    """Adapted projections, then narrow frozen ones, as one node."""

    def __init__(self, members: Sequence[Member]) -> None:
        adapted = [member for member in members if isinstance(member, FusedLora)]
        super().__init__([*adapted, *(member for member in members if isinstance(member, SharingLinear))])

    def together(self, x: Tensor) -> tuple[Tensor, ...]:
        adapted = [member for member in self.members if isinstance(member, FusedLora)]
        return _together(adapted, self.members[len(adapted) :], x)


def _together(
    adapted: Sequence[FusedLora], plain: Sequence[SharingLinear], x: Tensor, dropped: Tensor | None = None
) -> tuple[Tensor, ...]:
    return lora_matmul(
        x,
        [member.base_layer.weight for member in adapted],
        [member.base_layer.bias for member in adapted],
        [member.lora_A.weight for member in adapted],
        [member.lora_B.weight for member in adapted],
        [member.scaling for member in adapted],
        dropped,
        [member.weight for member in plain],
    )


def _around(weight: nn.Parameter) -> nn.Linear:
    """A Linear that holds an existing parameter, whose name so ends in `lora_A.weight` or `lora_B.weight`."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    return linear
