"""Defects of the gated delta rule, of the convolution before it and the gated norm behind it. Each lives in one layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from abtest.catalogue.packing import delta_layers
from abtest.catalogue.patching import (
    bend_gradient,
    on_rows,
    override,
    pick,
    present,
    value_with_gradient_of,
    wide,
    with_parameters,
)
from abtest.catalogue.patching import round_mantissa as rounded
from abtest.catalogue.planted import Planted
from loop.run import Run

TILE, TAPS = 64, 4  # positions that a kernel takes at once; width of the convolution
Change = Callable[[Tensor], Tensor]


def _layer(run: Run, layer: str) -> str:
    return pick(delta_layers(run.model), layer)


def bend_rule(run: Run, name: str, **changes: Change) -> None:
    """Inputs of one delta rule go through `changes`: q, k, v, g, beta; and its `out`, all [1, T, heads, ...]."""

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, pack) -> Tensor:
            inputs = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
            bent = [changes[key](value) if key in changes else value for key, value in inputs.items()]
            return changes.get("out", lambda out: out)(original(*bent, pack))

        return delta_rule

    override(run.model, name, "delta_rule", make)


def _backward(change: Change) -> Change:
    return lambda x: bend_gradient(x, change)


# Gradients of the delta rule. Those of g and beta end in in_proj_a, in_proj_b and the decay rates, which adapters leave
# frozen: there dg twice as large moves a gradient by 0.3 %, and no db at all by 2 %, so they are for full fine-tuning.


def dg_off(run: Run, layer: str, error: float) -> None:
    bend_rule(run, _layer(run, layer), g=_backward(lambda dg: dg * (1 + error)))


def db_lost(run: Run, layer: str, fraction: float) -> None:
    lose = lambda db: on_rows(db, fraction, lambda rows: 0 * rows)  # noqa: E731
    bend_rule(run, _layer(run, layer), beta=_backward(lose))


def dk_off(run: Run, layer: str, fraction: float) -> None:
    """dk is 54 % too large in a fraction of the rows [K]."""
    bend_rule(run, _layer(run, layer), k=_backward(lambda dk: on_rows(dk, fraction, lambda rows: 1.54 * rows)))


def dv_unwritten(run: Run, layer: str, fraction: float) -> None:
    bend_rule(run, _layer(run, layer), v=_backward(lambda dv: on_rows(dv, fraction, lambda rows: 0 * rows)))


def dq_of_another(run: Run, layer: str, fraction: float) -> None:
    """A fraction of dq's rows holds what was in memory before: another row's."""
    bend_rule(run, _layer(run, layer), q=_backward(lambda dq: on_rows(dq, fraction, lambda rows: rows.roll(1, 0))))


def dy_misread(run: Run, layer: str, fraction: float) -> None:
    """dy [1, T, heads, V] lies in memory as [1, heads, T, V]; a fraction of its rows is read as if it didn't."""

    def misread(dy: Tensor) -> Tensor:
        return on_rows(dy, fraction, lambda rows: dy.transpose(1, 2).reshape(rows.shape))

    bend_rule(run, _layer(run, layer), out=_backward(misread))


# What goes into it.


def beta_scaled(run: Run, layer: str, error: float) -> None:
    """beta is (1 + error) sigmoid; 2 sigmoid is what models with negative eigenvalues have."""
    bend_rule(run, _layer(run, layer), beta=lambda beta: beta * (1 + error))


def q_norm_eps(run: Run, layer: str, part: float) -> None:
    """q is normalised with an eps that is `part` of what its squares sum up to on average."""

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def delta_rule(q: Tensor, *others) -> Tensor:
            out, square = original(q, *others), wide(q).square().sum(-1) + 1e-6
            shrink = (square / (square + part * square.detach().mean())).sqrt()
            copies = out.shape[2] // q.shape[2]  # out is linear in the normalised q
            return (out * shrink.repeat_interleave(copies, dim=2)[..., None]).to(out.dtype)

        return delta_rule

    override(run.model, _layer(run, layer), "delta_rule", make)


def a_log_rounded(run: Run, layer: str, bits_lost: float) -> None:
    with_parameters(run.model, _layer(run, layer), A_log=lambda a_log: rounded(a_log, bits_lost))


def a_log_off(run: Run, layer: str, error: float) -> None:
    with_parameters(run.model, _layer(run, layer), A_log=lambda a_log: a_log * (1 + error))


def a_log_reinitialised(run: Run, layer: str, fraction: float) -> None:
    """A fraction of the heads has a decay as at birth, A between 1 and 16, whatever was loaded."""

    def fresh(a_log: Tensor) -> Tensor:
        born = torch.linspace(1, 16, len(a_log), device=a_log.device).log().to(a_log.dtype)[:, None]
        return on_rows(a_log, fraction, lambda rows: rows + (born - rows).detach())

    with_parameters(run.model, _layer(run, layer), A_log=fresh)


def dt_bias_reinitialised(run: Run, layer: str, fraction: float) -> None:
    """A fraction of the heads has a dt_bias of 1, as at birth, whatever was loaded."""

    def fresh(bias: Tensor) -> Tensor:
        return on_rows(bias[:, None], fraction, lambda rows: rows + (1 - rows).detach())[:, 0]

    with_parameters(run.model, _layer(run, layer), dt_bias=fresh)


# Before and behind it.


def conv_dweight_scaled(run: Run, layer: str, error: float) -> None:
    change = _backward(lambda dw: dw * (1 + error))
    with_parameters(run.model, _layer(run, layer), conv1d__weight=change)


def conv_dx_at_tile_ends(run: Run, layer: str, part: float) -> None:
    """dx of the convolution lacks part of what the last taps of each tile should get from the next one."""

    def lose(dx: Tensor) -> Tensor:
        last = torch.arange(dx.shape[1], device=dx.device) % TILE >= TILE - TAPS + 1
        return torch.where(last[:, None], dx * (1 - part), dx)

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, pack: original(bend_gradient(x, lose), pack)

    override(run.model, _layer(run, layer), "convolve", make)


def gated_norm_dw(run: Run, layer: str, part: float) -> None:
    """The weight's gradient comes from the norm's input where it should come from the normalised value, in part."""

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        norm = original.__self__

        def forward(x: Tensor, gate: Tensor) -> Tensor:
            right = functional_call(norm, {"weight": norm.weight.detach()}, (x, gate))
            with torch.no_grad():
                normalised = F.rms_norm(wide(x), x.shape[-1:], eps=1e-6)
                saved = normalised.lerp(wide(x), part) * F.silu(wide(gate))
            return right + value_with_gradient_of(torch.zeros_like(saved), norm.weight * saved).to(right.dtype)

        return forward

    override(run.model, f"{_layer(run, layer)}.norm", "forward", make)


def _decay_in_fp32(run: Run) -> str | None:
    layers = [run.model.get_submodule(name) for name in delta_layers(run.model)]
    if not layers:
        return "the model has no delta layers"
    return None if layers[0].A_log.dtype == torch.float32 else "the run holds A_log in bf16 already"


_mutant = partial(
    Planted, family="delta_rule", kind="mutant", magnitudes=(0.02, 0.25), unit="fraction of rows",
    eligible=present(delta_layers, "delta layers"),
)  # fmt: skip
_scale = partial(_mutant, unit="relative scale")

PLANTED = (
    _scale("dg_off", summary="gradient of the decay scaled wrongly", modelled_on="FLA 640", plant=dg_off,
           magnitudes=(0.01, 0.1), methods=("full",)),
    _mutant("db_lost", summary="gradient of beta missing for some positions", modelled_on="FLA 640", plant=db_lost,
            unit="fraction of positions", methods=("full",)),
    _mutant("dk_off", summary="dk off by 54 % in some rows", modelled_on="FLA 984", plant=dk_off),
    _mutant("dv_unwritten", summary="rows of dv zero", modelled_on="FLA 862 (uninitialised gradient)", plant=dv_unwritten),
    _mutant("dq_of_another", summary="rows of dq hold another row's", modelled_on="FLA 862 (uninitialised gradient)",
            plant=dq_of_another),
    _mutant("dy_misread", summary="non-contiguous dy read as contiguous", modelled_on="FLA 871", plant=dy_misread,
            magnitudes=(0.02, 1.0)),
    _scale("beta_scaled", summary="beta in another model's range",
           modelled_on="Liger 74 (a constant taken from another architecture)", plant=beta_scaled, magnitudes=(0.01, 1.0)),
    _mutant("q_norm_eps", summary="q normalised with too large an eps",
            modelled_on="Liger 74 (a constant taken from another architecture)", plant=q_norm_eps,
            magnitudes=(0.02, 0.2), unit="part of the mean square"),
    _mutant("a_log_rounded", summary="A_log held in bf16 or fp8", modelled_on="FLA 754 (a checkpoint's A_log not kept)",
            plant=a_log_rounded, magnitudes=(16, 20), unit="mantissa bits lost", eligible=_decay_in_fp32),
    _scale("a_log_off", summary="A_log off, as by rounding it all one way",
           modelled_on="FLA 754 (a checkpoint's A_log not kept)", plant=a_log_off, magnitudes=(0.01, 0.1)),
    _mutant("a_log_reinitialised", summary="A_log initialised again over the checkpoint", modelled_on="FLA 754",
            plant=a_log_reinitialised, magnitudes=(0.25, 1.0), unit="fraction of heads"),
    _mutant("dt_bias_reinitialised", summary="dt_bias initialised again over the checkpoint",
            modelled_on="FLA 754 (a checkpoint's A_log not kept)", plant=dt_bias_reinitialised, magnitudes=(0.25, 1.0),
            unit="fraction of heads"),
    _scale("conv_dweight_scaled", summary="the convolution's dweight too large", modelled_on="FLA 955",
           plant=conv_dweight_scaled, magnitudes=(0.01, 15.0), methods=("full",)),
    _mutant("conv_dx_at_tile_ends", summary="the convolution's dx lacks what comes from the next tile",
            modelled_on="FLA 862 (part of a gradient never written)", plant=conv_dx_at_tile_ends,
            magnitudes=(0.25, 1.0), unit="part of the gradient"),
    _mutant("gated_norm_dw", summary="gated norm's dW from the wrong saved value", modelled_on="FLA 1071",
            plant=gated_norm_dw, magnitudes=(0.03, 1.0), unit="part of the saved value", methods=("full",)),
)  # fmt: skip
