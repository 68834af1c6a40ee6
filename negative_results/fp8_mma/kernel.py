"""A frozen linear layer in e4m3: y = Q(x) Q(W)^T forward, dx = Q(dy) Q(W^T)^T backward, as custom op and as module.

Q rounds to e4m3 with a scale for each row: for each token of x and dy, each output channel of W, each input channel of W^T.
Both products then run over contiguous memory, and each is the other's backward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .mma import mma_product
from .reference import E4M3, product_reference, quantise_rows_reference

DTYPES = (torch.bfloat16, torch.float32)
MMA_MAJORS = (8, 12)  # Ada's and consumer Blackwell's tensor cores take e4m3 from mma.sync; elsewhere it is widened to fp16


def uses_mma(capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability gets the kernel in CUDA C++, or `torch._scaled_mm`."""
    return capability[0] in MMA_MAJORS


def quantised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.quantise_rows_reference`, by a kernel where there is a GPU for it; the bits are the same."""
    if not rows.is_cuda:
        return quantise_rows_reference(rows)
    from .quantise import quantise_rows

    return quantise_rows(rows)


def product(codes_x: Tensor, scales_x: Tensor, codes_w: Tensor, scales_w: Tensor, dtype: torch.dtype) -> Tensor:
    """`reference.product_reference` on tensor cores where there are any; the README says which bits are the same."""
    if not codes_x.is_cuda:
        return product_reference(codes_x, scales_x, codes_w, scales_w, dtype)
    arm = mma_product if uses_mma(torch.cuda.get_device_capability(codes_x.device)) else scaled_mm_product
    return arm(codes_x, scales_x, codes_w, scales_w, dtype)


def scaled_mm_product(codes_x: Tensor, scales_x: Tensor, codes_w: Tensor, scales_w: Tensor, dtype: torch.dtype) -> Tensor:
    """The same through PyTorch: [T, K] and [O, K] with both K and O multiples of 16 -> [T, O] bfloat16."""
    if not len(codes_x):
        return scales_x.new_empty((0, len(codes_w)), dtype=dtype)
    x, w = codes_x.view(E4M3), codes_w.view(E4M3)
    return torch._scaled_mm(x, w.t(), scale_a=scales_x[:, None], scale_b=scales_w[None], out_dtype=dtype)


@torch.library.custom_op("isoloss::fp8_linear", mutates_args=())
def _linear(x: Tensor, codes: Tensor, scales: Tensor, codes_t: Tensor, scales_t: Tensor) -> Tensor:
    rows = x.reshape(-1, codes.shape[1])
    return product(*quantised(rows), codes, scales, x.dtype).view(*x.shape[:-1], codes.shape[0])


@_linear.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, codes_t: Tensor, scales_t: Tensor) -> Tensor:
    return torch.empty((*x.shape[:-1], codes.shape[0]), dtype=x.dtype, device=x.device)


def _save_weights(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _differentiate(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    codes, scales, codes_t, scales_t = ctx.saved_tensors
    return _linear(dy, codes_t, scales_t, codes, scales), None, None, None, None


_linear.register_autograd(_differentiate, setup_context=_save_weights)


def fp8_linear(x: Tensor, codes: Tensor, scales: Tensor, codes_t: Tensor, scales_t: Tensor) -> Tensor:
    """x [..., in] in bfloat16 or float32 -> [..., out] in its dtype, with a frozen weight as `quantise_weight` gives it.

    Differentiable in x: its gradient is the product of the quantised incoming gradient with the other layout of the weight,
    which is not the derivative of the rounded function (that is zero almost everywhere). Raises ValueError for another width
    or dtype.
    """
    if x.shape[-1] != codes.shape[1]:
        raise ValueError(f"fp8_linear: x is {list(x.shape)}; the last size must be {codes.shape[1]}")
    if x.dtype not in DTYPES:
        raise ValueError(f"fp8_linear: dtype {x.dtype} is not one of {', '.join(map(str, DTYPES))}")
    return _linear(x, codes, scales, codes_t, scales_t)


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight [out, in] -> codes [out, in], scales [out], codes_t [in, out], scales_t [in]: a scale for each output channel,
    and for the transposed weight one for each input channel."""
    weight = weight.detach()
    return *quantised(weight), *quantised(weight.t().contiguous())


class Fp8Linear(nn.Module):
    """Stands where a frozen nn.Linear stood, with the very parameters that it had; computes with e4m3 copies of the weight.

    x [..., in] -> [..., out] in x's dtype. The copies are made here, and again once the weight was written to; no checkpoint
    has them. Raises ValueError for a layer that trains.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        if any(parameter.requires_grad for parameter in linear.parameters()):
            raise ValueError("Fp8Linear: the layer trains; only a frozen weight can be quantised once")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.training = linear.training
        self._quantise()

    def _quantise(self) -> None:
        for name, value in zip(("codes", "scales", "codes_t", "scales_t"), quantise_weight(self.weight), strict=True):
            self.register_buffer(name, value, persistent=False)
        self.version = self.weight._version

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and self.weight._version != self.version:  # a trace can't branch on a version
            self._quantise()
        y = fp8_linear(x, self.codes, self.scales, self.codes_t, self.scales_t)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
