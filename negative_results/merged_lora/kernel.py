"""A LoRA projection whose adapter lives in its base's weight: every step's change of s B A is added to W in place.

The forward is the base's alone, one product, and no second copy of W is kept. What a step adds is rounded to W's dtype: of a
change below half a unit in the last place of W nothing is left, and no later step makes up for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@torch.no_grad()
def merge_(weight: Tensor, a: Tensor, b: Tensor, old_a: Tensor, old_b: Tensor, scaling: float) -> Tensor:
    """weight += s (B A - old B old A) in place: the two products and their difference in fp32 or wider, one rounding to
    weight's dtype. weight [out, in], a and old_a [rank, in], b and old_b [out, rank]; returns weight."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    change = b.to(wide) @ a.to(wide) - old_b.to(wide) @ old_a.to(wide)
    return weight.copy_(weight.to(wide).add_(change, alpha=scaling))


def merged_linear(x: Tensor, merged: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """x merged^T + bias, with the gradients of x (W + s B A)^T: to x through `merged`, to A and B by LoRA's skinny products.

    x [..., in]; merged [out, in], which gets no gradient; bias [out] or None, frozen; a [rank, in]; b [out, rank]; one dtype
    and device. Differentiable once in x, a and b.
    """
    return _MergedLinear.apply(x, merged, bias, a, b, scaling)


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, merged: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(x, merged, a, b)
        ctx.scaling = scaling
        return F.linear(x, merged, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, merged, a, b = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        rows, seen = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = (rows @ merged).view(x.shape) if needs_x else None
        da = ((rows @ b) * ctx.scaling).t() @ seen if needs_a else None
        db = rows.t() @ ((seen @ a.t()) * ctx.scaling) if needs_b else None
        return dx, None, None, da, db, None


class MergedLora(nn.Module):
    """Stands where a PEFT LoRA layer without dropout stood, around the same parameters. x [..., in] -> [..., out].

    `base_layer.weight` holds W + s B A from the first forward on, and follows A and B at the first one after they changed.
    """

    def __init__(self, base: nn.Linear, a: nn.Parameter, b: nn.Parameter, scaling: float) -> None:
        super().__init__()
        if not a.dtype == b.dtype == base.weight.dtype:
            raise ValueError(f"adapter dtypes {a.dtype}, {b.dtype} differ from the base's {base.weight.dtype}")
        self.base_layer = base
        self.lora_A, self.lora_B = _around(a), _around(b)
        self.scaling, self.dropout = scaling, 0.0
        self.merged_a, self.merged_b = torch.zeros_like(a), torch.zeros_like(b)  # what the weight holds now
        self.seen: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        a, b, base = self.lora_A.weight, self.lora_B.weight, self.base_layer
        if self.seen != (versions := (a._version, b._version)):  # an optimizer's step writes in place
            merge_(base.weight, a, b, self.merged_a, self.merged_b, self.scaling)
            self.merged_a, self.merged_b, self.seen = a.detach().clone(), b.detach().clone(), versions
        return merged_linear(x, base.weight, base.bias, a, b, self.scaling)


def _around(weight: nn.Parameter) -> nn.Linear:
    """A Linear around an existing parameter, so that its name stays `lora_A.weight`."""
    holder = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    holder.weight = weight
    return holder
