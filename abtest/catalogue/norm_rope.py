"""Defects of RMS norms, of rotary positions, and of what attention makes of them backwards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from abtest.catalogue.patching import bend_gradient, bend_output, named, names_of, on_rows, override, pick, present
from abtest.catalogue.patching import round_mantissa as rounded
from abtest.catalogue.planted import Planted
from loop.run import Run

TILE = 128  # rows that an attention kernel takes at once
FAR = 1024  # first position of documents whose angles are rounded


def _norms(model: nn.Module) -> list[str]:
    return named(model, ".input_layernorm", ".post_attention_layernorm", "model.norm")


def _inner_norms(model: nn.Module) -> list[str]:
    """Those with something trained below them, whatever trains."""
    return named(model, ".post_attention_layernorm", "model.norm")


def _centred_norms(model: nn.Module) -> list[str]:
    return [name for name in names_of(model, "Qwen3_5RMSNorm") if name in _norms(model)]


def _attentions(model: nn.Module) -> list[str]:
    return named(model, ".self_attn")


def _qk_norms(model: nn.Module) -> list[str]:
    return named(model, ".q_norm", ".k_norm")


def _queries(model: nn.Module) -> list[str]:
    """What gives the queries [B, L, ...] of each layer."""
    return named(model, ".q_norm") or named(model, ".q_proj")


def _mean_square(x: Tensor) -> Tensor:
    return x.float().square().mean(-1, keepdim=True)


# Norms.


def one_omitted(run: Run, layer: str, part: float) -> None:
    """The output is multiplied by 1 - part + w instead of 1 + w."""

    def less(out: Tensor, x: Tensor) -> Tensor:
        return (out.float() - part * F.rms_norm(x.float(), x.shape[-1:], eps=1e-6)).to(out.dtype)

    bend_output(run.model, pick(_centred_norms(run.model), layer), less)


class _SumInBf16(torch.autograd.Function):
    """w [D] -> a copy for every block [blocks, D]; backwards the blocks' gradients are added up in bf16."""

    @staticmethod
    def forward(ctx, weight: Tensor, blocks: int) -> Tensor:
        return weight.expand(blocks, -1).clone()

    @staticmethod
    def backward(ctx, gradients: Tensor) -> tuple[Tensor, None]:
        total = torch.zeros_like(gradients[0], dtype=torch.bfloat16)
        for gradient in gradients.bfloat16():
            total = total + gradient
        return total.to(gradients.dtype), None


def dw_in_bf16(run: Run, layer: str, blocks: float) -> None:
    """dW is a bf16 sum of one partial sum a block of rows."""

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        norm = original.__self__

        def forward(x: Tensor) -> Tensor:
            parts = x.reshape(-1, x.shape[-1]).tensor_split(int(blocks))
            weights = _SumInBf16.apply(norm.weight, int(blocks))
            outs = [functional_call(norm, {"weight": w}, (part,)) for w, part in zip(weights, parts, strict=True)]
            return torch.cat(outs).view_as(x)

        return forward

    override(run.model, pick(_norms(run.model), layer), "forward", make)


def dw_loses_rows(run: Run, layer: str, fraction: float) -> None:
    """Some rows' share of dW is in partial sums that nobody adds up."""

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        norm = original.__self__

        def forward(x: Tensor) -> Tensor:
            lost = functional_call(norm, {"weight": norm.weight.detach()}, (x,))
            return on_rows(original(x), fraction, lambda rows: lost.view_as(rows))

        return forward

    override(run.model, pick(_norms(run.model), layer), "forward", make)


def dy_clobbered(run: Run, layer: str, fraction: float) -> None:
    """dX overwrites dY in place before some rows have read it: they go through the backward twice."""

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def again(x: Tensor, dx: Tensor) -> Tensor:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                return torch.autograd.grad(original(leaf), leaf, dx)[0]

        def forward(x: Tensor) -> Tensor:
            clobber = lambda dx: on_rows(dx, fraction, lambda rows: again(x, dx).view_as(rows))  # noqa: E731
            return original(bend_gradient(x, clobber))

        return forward

    override(run.model, pick(_inner_norms(run.model), layer), "forward", make)


def rstd_of_neighbour(run: Run, layer: str, fraction: float) -> None:
    """Backwards some rows use the root mean square saved for the row before them."""

    def scale(out: Tensor, x: Tensor) -> Tensor:
        rms = (_mean_square(x.detach()) + 1e-6).sqrt().flatten(0, -2)
        ratio = (rms / rms.roll(1, 0)).to(out.dtype)
        return bend_gradient(out, lambda dy: on_rows(dy, fraction, lambda rows: rows * ratio))

    bend_output(run.model, pick(_inner_norms(run.model), layer), scale)


def eps_too_large(run: Run, layer: str, part: float) -> None:
    """An eps that is `part` of what the rows' mean square is on average."""

    def shrink(out: Tensor, x: Tensor) -> Tensor:
        square = _mean_square(x) + 1e-6
        return (out.float() * (square / (square + part * square.detach().mean())).sqrt()).to(out.dtype)

    bend_output(run.model, pick(_norms(run.model), layer), shrink)


def weight_first(run: Run, layer: str, part: float) -> None:
    """Part of the way from x / rms(x) * w to x w / rms(x w): the same where w has one value."""

    def again(out: Tensor, x: Tensor) -> Tensor:
        normalised = F.rms_norm(x.float(), x.shape[-1:], eps=1e-6)
        wrong = out.float() * (_mean_square(normalised) / _mean_square(out)).sqrt()
        return out.float().lerp(wrong, part).to(out.dtype)

    bend_output(run.model, pick(_norms(run.model), layer), again)


def qk_norm_scaled(run: Run, layer: str, error: float) -> None:
    bend_output(run.model, pick(_qk_norms(run.model), layer), lambda out, x: out * (1 + error))


# Rotary positions.


def _bend_angles(run: Run, layer: str, angles: Callable[[Tensor, Tensor], Tensor]) -> None:
    """One attention layer gets tables of `angles(positions [B, L, 1], inv_freq [F])` [B, L, F], in fp32."""
    rotary = next(module for module in run.model.modules() if hasattr(module, "inv_freq"))

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(*inputs, position_embeddings, position_ids, **options):
            half = angles(position_ids.float()[..., None], rotary.inv_freq.float())
            angle = torch.cat((half, half), dim=-1)
            old = position_embeddings[0]
            tables = tuple((table * rotary.attention_scaling).to(old.dtype) for table in (angle.cos(), angle.sin()))
            return original(*inputs, position_embeddings=tables, position_ids=position_ids, **options)

        return forward

    override(run.model, pick(_attentions(run.model), layer), "forward", make)


def positions_in_bf16(run: Run, layer: str, first: float) -> None:
    """Positions count from `first`, as late in a long context, where bf16 no longer holds every integer.

    The offset alone would change nothing: attention sees differences of positions.
    """
    _bend_angles(run, layer, lambda positions, inv_freq: (positions + first).bfloat16().float() * inv_freq)


def angles_rounded(run: Run, layer: str, bits_lost: float) -> None:
    """Rounds the angles of positions that count from FAR, where a long context would be."""
    _bend_angles(run, layer, lambda positions, inv_freq: rounded((positions + FAR) * inv_freq, bits_lost))


def inv_freq_wrong(run: Run, layer: str, error: float) -> None:
    _bend_angles(run, layer, lambda positions, inv_freq: positions * inv_freq * (1 + error))


# Attention's backward.


def dq_garbage_at_ragged_length(run: Run, layer: str, fraction: float) -> None:
    """Where L % 128 == 64, finite garbage in dQ of the last half tile."""

    def garble(dq: Tensor) -> Tensor:
        wrong = round(fraction * TILE / 2)
        return torch.cat([dq[:, :-wrong], dq[:, -wrong:].flip(-1)], dim=1)

    def bend(q: Tensor, x: Tensor) -> Tensor:
        return bend_gradient(q, garble) if q.shape[1] % TILE == TILE / 2 else q

    bend_output(run.model, pick(_queries(run.model), layer), bend)


def dq_wrong_for_large_q(run: Run, layer: str, error: float) -> None:
    """dQ is off where |q| is above the average, so that inputs all alike don't show it."""

    def bend(q: Tensor, x: Tensor) -> Tensor:
        size = q.detach().float().norm(dim=-1, keepdim=True)
        factor = torch.where(size > size.mean(), 1 + error, 1.0).to(q.dtype)
        return bend_gradient(q, lambda dq: dq * factor)

    bend_output(run.model, pick(_queries(run.model), layer), bend)


_mutant = partial(Planted, family="norm_rope", kind="mutant")
_rope = partial(_mutant, eligible=present(_attentions, "attention with rotary positions"))

PLANTED = (
    _mutant("norm_one_omitted", summary="RMS norm multiplies by less than 1 + w", modelled_on="Liger 74", plant=one_omitted,
            magnitudes=(0.01, 1.0), unit="part of the 1 omitted",
            eligible=present(_centred_norms, "norm whose weight is stored around zero")),
    _mutant("norm_dw_in_bf16", summary="dW of a norm summed over blocks in bf16", modelled_on="Liger 950", plant=dw_in_bf16,
            magnitudes=(8, 64), unit="blocks of rows", methods=("full",)),
    _mutant("norm_dw_loses_rows", summary="partial sums of a norm's dW lost", modelled_on="Liger 950", plant=dw_loses_rows,
            magnitudes=(0.02, 0.25), unit="fraction of rows", methods=("full",)),
    _mutant("norm_dy_clobbered", summary="in-place norm backward overwrites dY while it is read",
            modelled_on="Liger 376", plant=dy_clobbered, magnitudes=(0.02, 0.25), unit="fraction of rows"),
    _mutant("norm_rstd_of_neighbour", summary="norm backward reads another row's saved statistic",
            modelled_on="FLA 1071 (gradient from the wrong saved value)", plant=rstd_of_neighbour,
            magnitudes=(0.02, 0.25), unit="fraction of rows"),
    _mutant("norm_eps_too_large", summary="a norm with another model's eps",
            modelled_on="Liger 74 (a norm's constants taken from another architecture)", plant=eps_too_large,
            magnitudes=(0.02, 0.2), unit="part of the mean square"),
    _mutant("norm_weight_first", summary="a norm taken behind its weight",
            modelled_on="vllm-project/tpu-inference 3040, without its factor of two", plant=weight_first,
            magnitudes=(0.1, 1.0), unit="part of the difference"),
    _mutant("qk_norm_scaled", summary="q or k norm with its scale off", modelled_on="Liger 74", plant=qk_norm_scaled,
            magnitudes=(0.01, 0.1), unit="relative scale", eligible=present(_qk_norms, "norms of queries and keys")),
    _rope("rope_positions_in_bf16", summary="positions held in bf16", modelled_on="transformers 29285",
          plant=positions_in_bf16, magnitudes=(256, 1024), unit="first position"),
    _rope("rope_angles_rounded", summary="rotary angles in TF32 or bf16", modelled_on="transformers 48428 and 29285",
          plant=angles_rounded, magnitudes=(13, 16), unit="mantissa bits lost"),
    _rope("rope_inv_freq_wrong", summary="rotary frequencies off", modelled_on="unsloth 4112", plant=inv_freq_wrong,
          magnitudes=(0.01, 0.1), unit="relative scale"),
    _mutant("dq_garbage_at_ragged_length", summary="garbage dQ in the last half tile where L % 128 == 64",
            modelled_on="pytorch 196678, without its NaN", plant=dq_garbage_at_ragged_length,
            magnitudes=(0.25, 1.0), unit="part of the half tile", eligible=present(_queries, "attention")),
    _mutant("dq_wrong_for_large_q", summary="dQ off where |q| is large, loss untouched",
            modelled_on="TransformerEngine 3216", plant=dq_wrong_for_large_q,
            magnitudes=(0.03, 0.3), unit="relative scale", eligible=present(_queries, "attention")),
)  # fmt: skip
