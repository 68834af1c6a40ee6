"""Cross-entropy of a vocabulary product, in chunks of rows: row kernel, custom ops, autograd, public functions.

A row of logits x with label t and largest logit m:  loss = log sum_j exp(x_j - m) + m - x_t,
d loss / d x_j = exp(x_j - m) / sum - [j = t].  A chunk's logits become their own gradient in place; the two products that
need it follow at once, and the next chunk takes the same memory. So the gradients are known when forward ends, and backward
only multiplies them by the incoming one. They are kept in fp32 until then, and rounded to the compute dtype once.
"""

from __future__ import annotations

import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.language.extra import libdevice

from kernels.supervised_logits.kernel import supervised_rows
from loop.batch import IGNORE, PackedBatch

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
IGNORED = tl.constexpr(IGNORE)
LOWEST = tl.constexpr(-3.4e38)  # finite, unlike -inf: a difference with it is no NaN
BLOCK = 8192  # logits a step of one row: 16 a thread
WARPS = 16
SCALE_BLOCK, SCALE_WARPS = 2048, 4  # numbers a program, in loads of 16 bytes
TILE_INTERPRETED = 1 << 16  # the interpreter's cost is per step of a program, not per element
CHUNK_BYTES = 1 << 30  # of logits at a time
CHUNK_LEAST_ROWS = 1024  # whatever they take: every chunk reads the whole head, and a product of few rows is bound by that
CHUNK_MULTIPLE = 128  # rows of a product's tile
DTYPES = (torch.bfloat16, torch.float32)


@triton.jit
def _exp(b_x, PRECISE: tl.constexpr):
    """PRECISE: to the last bits, which only an fp32 result can show. The interpreter's tl.exp is NumPy's, precise anyway."""
    if PRECISE and not INTERPRETED:
        return libdevice.exp(b_x)
    else:
        return tl.exp(b_x)


@triton.jit
def _log(b_x):
    """Precise in every dtype: there is one a row, and near 1 the fast one is not."""
    if INTERPRETED:
        return tl.log(b_x)
    else:
        return libdevice.log(b_x)


@triton.jit
def _row_kernel(
    p_logits, p_labels, p_losses, rows, vocabulary,
    GRADIENT: tl.constexpr, PRECISE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # int64: logits may be more than 2^31
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    b_label = tl.load(p_labels + o_row, mask=m_row, other=IGNORED)
    m_counts = b_label != IGNORED
    m_label = (b_label >= 0) & (b_label < vocabulary)
    p_row = p_logits + o_row * vocabulary
    # a label outside the vocabulary gives NaN, in the loss and in the row's gradient: a GPU can't raise
    b_target = tl.load(p_row + b_label, mask=m_label, other=float("nan")).to(tl.float32)

    b_max = tl.full([ROWS], LOWEST, tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        o_column = start + tl.arange(0, BLOCK)
        m_tile = m_counts[:, None] & (o_column < vocabulary)[None, :]
        b_x = tl.load(p_row[:, None] + o_column[None, :], mask=m_tile, other=float("-inf")).to(tl.float32)
        b_larger = tl.maximum(b_max, tl.max(b_x, axis=1))
        b_sum = b_sum * _exp(b_max - b_larger, PRECISE) + tl.sum(_exp(b_x - b_larger[:, None], PRECISE), axis=1)
        b_max = b_larger
    b_sum = tl.where(m_counts, b_sum, 1.0)
    b_loss = tl.where(m_counts, _log(b_sum) + (b_max - b_target), 0.0)
    tl.store(p_losses + o_row, b_loss, mask=m_row)

    if GRADIENT:
        tl.debug_barrier()  # every thread has read the label's logit before one of them overwrites it
        b_inverse = tl.where(m_label, 1.0 / b_sum, float("nan"))
        for start in range(0, vocabulary, BLOCK):
            o_column = start + tl.arange(0, BLOCK)
            m_column = (o_column < vocabulary)[None, :]
            p_tile = p_row[:, None] + o_column[None, :]
            b_x = tl.load(p_tile, mask=m_counts[:, None] & m_column, other=float("-inf")).to(tl.float32)
            b_p = _exp(b_x - b_max[:, None], PRECISE) * b_inverse[:, None]
            # 1 goes off in fp32: of a p near 1 that was rounded to bf16, nothing right would be left
            b_dx = b_p - tl.where(o_column[None, :] == b_label[:, None], 1.0, 0.0)
            b_dx = tl.where(m_counts[:, None], b_dx, 0.0)
            tl.store(p_tile, b_dx.to(p_logits.dtype.element_ty), mask=m_row[:, None] & m_column)


@triton.jit
def _scale_kernel(p_gradient, p_factor, p_total, size, ADD: tl.constexpr, BLOCK: tl.constexpr):
    # int64: a head may have more than 2^31 numbers
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o < size
    b_total = tl.load(p_gradient + o, mask=mask) * tl.load(p_factor)
    if ADD:
        b_total += tl.load(p_total + o, mask=mask)
    tl.store(p_total + o, b_total, mask=mask)


def add_scaled(gradient: Tensor, factor: Tensor, held: Tensor | None = None, into: Tensor | None = None) -> Tensor:
    """gradient * factor, added to `held` in place where there is one, else written to `into` where that is given.

    gradient, held, into and the result: one shape, fp32, contiguous, on one device; factor: one fp32 number there.
    """
    total = held if held is not None else torch.empty_like(gradient) if into is None else into
    block = TILE_INTERPRETED if INTERPRETED.value else SCALE_BLOCK
    with torch.cuda.device(gradient.device) if gradient.is_cuda else contextlib.nullcontext():
        _scale_kernel[(triton.cdiv(gradient.numel(), block),)](
            gradient, factor, total, gradient.numel(), ADD=held is not None, BLOCK=block, num_warps=SCALE_WARPS
        )
    return total


def cross_entropy_rows_(logits: Tensor, labels: Tensor, losses: Tensor, gradient: bool) -> None:
    """Writes the cross-entropy of every row to `losses`, and with `gradient` its derivative over the logits themselves.

    logits [N, V], bfloat16 or float32, contiguous; labels [N] int64, contiguous; losses [N] float32, contiguous. A row
    whose label is IGNORE has loss and gradient exactly zero; a label outside the vocabulary gives NaN in both.
    """
    rows, vocabulary = logits.shape
    block = min(triton.next_power_of_2(vocabulary), TILE_INTERPRETED if INTERPRETED.value else BLOCK)
    tile_rows = min(triton.next_power_of_2(rows), TILE_INTERPRETED // block) if INTERPRETED.value else 1
    device = torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext()
    with device:
        _row_kernel[(triton.cdiv(rows, tile_rows),)](
            logits, labels, losses, rows, vocabulary,
            GRADIENT=gradient, PRECISE=logits.dtype == torch.float32, ROWS=tile_rows, BLOCK=block, num_warps=WARPS,
        )  # fmt: skip


def rows_a_chunk(rows: int, vocabulary: int, itemsize: int) -> int:
    """How many of `rows` go through the head at once: as few chunks as the limit allows, all of about one size.

    The limit is what CHUNK_BYTES of logits are, but CHUNK_LEAST_ROWS however wide the vocabulary is. A chunk's rows are a
    multiple of CHUNK_MULTIPLE where the limit leaves room for that.
    """
    most = max(CHUNK_LEAST_ROWS, CHUNK_BYTES // (vocabulary * itemsize))
    even = math.ceil(rows / math.ceil(rows / most))
    return min(most, math.ceil(even / CHUNK_MULTIPLE) * CHUNK_MULTIPLE)


def _product(total: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """total [M, N] fp32 = a [M, K] @ b [K, N], or += with `add`; summed in fp32, whatever dtype a and b have."""
    if a.dtype == torch.float32:
        torch.addmm(total, a, b, beta=float(add), out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=float(add), out=total)
    else:  # a CPU has no product with a wider result
        torch.addmm(total, a.float(), b.float(), beta=float(add), out=total)


@torch.library.custom_op("isoloss::linear_cross_entropy", mutates_args=())
def _forward(
    rows: Tensor, weight: Tensor, labels: Tensor, want_d_rows: bool, want_d_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss sum, and fp32 gradients of rows and weight: of no elements where they are not wanted."""
    _check_labels(labels, len(weight))
    losses = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    d_rows = torch.empty(rows.shape if want_d_rows else 0, dtype=torch.float32, device=rows.device)
    d_weight = torch.empty(weight.shape if want_d_weight else 0, dtype=torch.float32, device=rows.device)
    if not len(rows):
        return losses.sum(), d_rows, d_weight.zero_()
    size = min(len(rows), rows_a_chunk(len(rows), len(weight), weight.itemsize))
    memory = torch.empty(size, len(weight), dtype=weight.dtype, device=weight.device)
    labels = labels.contiguous()
    for start in range(0, len(rows), size):
        chunk = slice(start, start + size)
        logits = memory[: len(rows[chunk])]
        torch.mm(rows[chunk], weight.t(), out=logits)
        cross_entropy_rows_(logits, labels[chunk], losses[chunk], want_d_rows or want_d_weight)
        if want_d_rows:
            _product(d_rows[chunk], logits, weight, add=False)
        if want_d_weight:
            _product(d_weight, logits.t(), rows[chunk], add=start > 0)
    return losses.sum(), d_rows, d_weight


def _check_labels(labels: Tensor, vocabulary: int) -> None:
    """Raises IndexError for a label outside the vocabulary; not on a GPU, which would have to be waited for."""
    if labels.is_cuda:
        return
    wrong = ((labels < 0) | (labels >= vocabulary)) & (labels != IGNORE)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise IndexError(
            f"linear_cross_entropy: row {row} has the label {int(labels[row])}; "
            f"0 to {vocabulary - 1} is in the vocabulary, and {IGNORE} is ignored"
        )


@_forward.register_fake
def _(rows: Tensor, weight: Tensor, labels: Tensor, want_d_rows: bool, want_d_weight: bool) -> tuple[Tensor, Tensor, Tensor]:
    sizes = ((), rows.shape if want_d_rows else (0,), weight.shape if want_d_weight else (0,))
    loss, d_rows, d_weight = (torch.empty(size, dtype=torch.float32, device=rows.device) for size in sizes)
    return loss, d_rows, d_weight


@torch.library.custom_op("isoloss::linear_cross_entropy_backward", mutates_args=())
def _backward(gradient: Tensor, dloss: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * dloss, both fp32, rounded once to `dtype`. What was saved stays as it is, for a second backward."""
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    return torch.mul(gradient, dloss, out=out)


@_backward.register_fake
def _(gradient: Tensor, dloss: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(gradient.shape, dtype=dtype, device=gradient.device)


def _save_gradients(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, d_rows, d_weight = output
    ctx.mark_non_differentiable(d_rows, d_weight)
    ctx.set_materialize_grads(False)  # else backward is handed zeros of the size of both
    ctx.save_for_backward(d_rows, d_weight)
    ctx.dtype = inputs[1].dtype


def _differentiate(ctx, dloss: Tensor, *_: None) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    wanted = zip(ctx.saved_tensors, ctx.needs_input_grad[:2], strict=True)
    d_rows, d_weight = (_backward(gradient, dloss, ctx.dtype) if needed else None for gradient, needed in wanted)
    return d_rows, d_weight, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save_gradients)


def check_inputs(rows: Tensor, weight: Tensor, labels: Tensor) -> None:
    """Raises ValueError for shapes, dtypes or devices that `linear_cross_entropy` does not take."""
    sides = (rows, weight, labels)
    if rows.ndim != 2 or weight.ndim != 2 or rows.shape[1] != weight.shape[1] or labels.shape != rows.shape[:1]:
        shapes = ", ".join(str(list(side.shape)) for side in sides)
        raise ValueError(f"linear_cross_entropy: rows [N, D], weight [V, D] and labels [N] are expected, not {shapes}")
    if rows.dtype != weight.dtype or rows.dtype not in DTYPES or labels.dtype != torch.int64:
        dtypes = ", ".join(str(side.dtype) for side in sides)
        raise ValueError(
            f"linear_cross_entropy: rows and weight must share bfloat16 or float32, and labels be int64, not {dtypes}"
        )
    if len({side.device for side in sides}) > 1:
        devices = ", ".join(str(side.device) for side in sides)
        raise ValueError(f"linear_cross_entropy: rows, weight and labels must be on one device, not {devices}")


def linear_cross_entropy(rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum over rows of the cross-entropy of `rows @ weight.T` with `labels`, a fp32 scalar, without all logits at once.

    rows [N, D] and weight [V, D]: one dtype, bfloat16 or float32; labels [N] int64, IGNORE where a row does not count. One
    device: CUDA, or CPU in Triton's interpreter. Logits are in the dtype of the inputs, softmax and loss in fp32, and d
    weight is summed over chunks in fp32. Differentiable once in rows and weight; what needs no gradient costs nothing.
    A label outside the vocabulary raises IndexError on a CPU and gives NaN on a GPU. Raises ValueError for other inputs.
    The method: logits in chunks with their gradient taken in forward, as in Liger Kernel (arXiv 2410.10989); the sum of
    exponentials in one pass, Milakov and Gimelshein 2018 (arXiv 1805.02867).
    """
    check_inputs(rows, weight, labels)
    training = torch.is_grad_enabled()
    loss, _, _ = _forward(rows, weight, labels, training and rows.requires_grad, training and weight.requires_grad)
    return loss


def linear_cross_entropy_head(model: nn.Module, hidden: Tensor, batch: PackedBatch) -> Tensor:
    """hidden [B, L, D] -> fp32 sum of cross-entropy over the batch's supervised positions, 0 where there are none."""
    rows, labels = supervised_rows(hidden, batch)
    return linear_cross_entropy(rows, model.get_output_embeddings().weight, labels)
