"""A linear layer whose forward product is Triton's `tl.dot` on e4m3 operands, each row of both scaled to the format's range.

y = (q_x q_w^T) s_x s_w^T with q = x / s rounded to e4m3 and s = max |x| / 448 of a row. Sums are the tensor core's own, in
fp32 registers. Backward is in the compute dtype, as if nothing had been rounded: dx = dy W, dW = dy^T x.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from negative_results.sm121a_matmul.kernel import block_of

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
# Three stages of two fp8 tiles are 96 KiB of shared memory, all that a block has on sm_120 and sm_121.
TILES = {"BT": 128, "BO": 128, "BD": 128, "GROUP": 8}
WARPS, STAGES = 8, 3
LARGEST_INTERPRETED = 1024  # of a tile's sides; the interpreter's cost is per step of a program
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _matmul_kernel(
    p_x, p_weight, p_x_scale, p_weight_scale, p_y, T, O, D,
    BT: tl.constexpr, BO: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # programs of GROUP rows of tiles run after one another, so that what they share is still in L2
    i_t, i_o = block_of(tl.program_id(0), T, O, BT, BO, GROUP)
    o_t = i_t.to(tl.int64) * BT + tl.arange(0, BT)  # int64: an activation may hold more than 2^31 elements
    o_o = i_o.to(tl.int64) * BO + tl.arange(0, BO)
    o_d = tl.arange(0, BD)
    m_t, m_o = o_t < T, o_o < O
    p_x_tile = p_x + o_t[:, None] * D + o_d[None, :]  # [BT, BD]
    p_weight_tile = p_weight + o_o[None, :] * D + o_d[:, None]  # [BD, BO]
    b_y = tl.zeros((BT, BO), tl.float32)
    for start in range(0, D, BD):
        m_d = o_d < D - start
        b_x = tl.load(p_x_tile + start, mask=m_t[:, None] & m_d[None, :], other=0.0)
        b_weight = tl.load(p_weight_tile + start, mask=m_d[:, None] & m_o[None, :], other=0.0)
        b_y = tl.dot(b_x, b_weight, b_y)
    b_x_scale = tl.load(p_x_scale + o_t, mask=m_t, other=0.0)
    b_weight_scale = tl.load(p_weight_scale + o_o, mask=m_o, other=0.0)
    b_y = b_y * b_x_scale[:, None] * b_weight_scale[None, :]
    tl.store(p_y + o_t[:, None] * O + o_o[None, :], b_y.to(p_y.dtype.element_ty), mask=m_t[:, None] & m_o[None, :])


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, D] -> e4m3 [N, D] and the scale of every row, fp32 [N], which brings its largest value to LARGEST.

    Rounded to nearest. A row of zeros has scale 1; one with a NaN or an infinity becomes NaN.
    """
    wide = x.float()
    largest = wide.abs().amax(1, keepdim=True) if x.shape[1] else wide.new_zeros(len(x), 1)
    scale = torch.where(largest == 0, 1.0, largest / LARGEST)
    return (wide / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale[:, 0]


def tiling(T: int, O: int, D: int) -> dict[str, int]:
    """Tile sizes of a launch. Interpreted, tiles are as large as the tensors, up to a limit."""
    if not triton.knobs.runtime.interpret:
        return TILES
    sides = (max(16, min(triton.next_power_of_2(size), LARGEST_INTERPRETED)) for size in (T, O, D))
    return dict(zip(("BT", "BO", "BD"), sides, strict=True)) | {"GROUP": TILES["GROUP"]}


@torch.library.custom_op("isoloss::triton_fp8_linear", mutates_args=())
def _forward(x: Tensor, weight: Tensor, weight_e4m3: Tensor, weight_scale: Tensor) -> Tensor:
    """weight itself is here for its gradient alone."""
    (T, D), O = x.shape, len(weight)
    y = torch.empty(T, O, dtype=x.dtype, device=x.device)
    x_e4m3, x_scale = quantise(x)
    tiles = tiling(T, O, D)
    grid = (triton.cdiv(T, tiles["BT"]) * triton.cdiv(O, tiles["BO"]),)
    device = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
    if y.numel():
        with device:
            _matmul_kernel[grid](
                x_e4m3, weight_e4m3, x_scale, weight_scale, y, T, O, D,
                **tiles, num_warps=WARPS, num_stages=STAGES,
            )  # fmt: skip
    return y


@_forward.register_fake
def _(x: Tensor, weight: Tensor, weight_e4m3: Tensor, weight_scale: Tensor) -> Tensor:
    return torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)


def _save(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _differentiate(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, _, _ = ctx.needs_input_grad
    return dy @ weight if needs_x else None, dy.t() @ x if needs_weight else None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def fp8_linear(x: Tensor, weight: Tensor, quantised: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """x weight^T through e4m3, [..., out], in x's dtype.

    x [..., in] and weight [out, in]: bfloat16, float16 or float32, one dtype and device (CUDA of capability 8.9 or more, or
    CPU in Triton's interpreter). quantised: what `quantise(weight)` gave, where the caller has it. Differentiable once in x
    and weight. Raises ValueError otherwise.
    """
    if x.shape[-1:] != weight.shape[1:] or x.dtype != weight.dtype or x.dtype not in DTYPES or x.device != weight.device:
        words = " and ".join(f"{list(side.shape)} {side.dtype} on {side.device}" for side in (x, weight))
        raise ValueError(f"fp8_linear: x [..., in] and weight [out, in] of one dtype and device are expected, not {words}")
    e4m3, scale = quantise(weight.detach()) if quantised is None else quantised
    return _forward(x.reshape(-1, x.shape[-1]), weight, e4m3, scale).view(*x.shape[:-1], len(weight))


class Fp8Linear(nn.Linear):
    """The linear layer that it is made of, with the same parameters; a weight that did not change is quantised once."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.version, self.quantised = -1, None
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.version != self.weight._version:
            self.version, self.quantised = self.weight._version, quantise(self.weight.detach())
        y = fp8_linear(x, self.weight, self.quantised)
        return y if self.bias is None else y + self.bias
