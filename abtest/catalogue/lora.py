"""Defects of adapters, and of what trains below a layer."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abtest.catalogue.patching import (
    around_micro_step,
    bend_gradient,
    bend_output,
    copy_kept,
    matrices,
    named,
    on_rows,
    override,
    pick,
)
from abtest.catalogue.patching import round_mantissa as rounded
from abtest.catalogue.planted import Planted
from loop.lora import Adapter, adapters
from loop.run import Run

Product = Callable[[Tensor, Adapter], Tensor]


def change_adapter(run: Run, layer: str, product: Product, endings: tuple[str, ...] = ("",)) -> None:
    """The first or last adapter whose name ends in one of `endings` gives base(x) + product(x, adapter)."""
    found = {adapter.name: adapter for adapter in adapters(run.model) if adapter.name.endswith(endings)}
    adapter = found[pick(found, layer)]
    override(run.model, adapter.name, "forward", lambda original: lambda x: adapter.base(x) + product(x, adapter))


def added(x: Tensor, adapter: Adapter) -> Tensor:
    """What an adapter adds when nothing is wrong, in PEFT's order."""
    return F.linear(F.linear(x, adapter.a), adapter.b) * adapter.scaling


INNER = ("down_proj", "o_proj", "out_proj")  # their input has something trained below it, in every layer


def scale_off(run: Run, layer: str, error: float) -> None:
    change_adapter(run, layer, lambda x, adapter: added(x, adapter) * (1 + error))


def scaled_again_backwards(run: Run, layer: str, part: float) -> None:
    """dB is multiplied by alpha / rank a second time, in part."""

    def product(x: Tensor, adapter: Adapter) -> Tensor:
        factor = 1 + part * (adapter.scaling - 1)
        return F.linear(F.linear(x, adapter.a), bend_gradient(adapter.b, lambda db: db * factor)) * adapter.scaling

    change_adapter(run, layer, product)


def dx_incomplete(run: Run, layer: str, part: float) -> None:
    """The base's gradient reaches the input, part of the adapter's doesn't."""
    change_adapter(run, layer, lambda x, adapter: added(bend_gradient(x, lambda dx: dx * (1 - part)), adapter), INNER)


def wrong_stride(run: Run, layer: str, fraction: float) -> None:
    """Some rows of B are read as if B were stored [rank, out]."""

    def product(x: Tensor, adapter: Adapter) -> Tensor:
        misread = adapter.b.reshape(adapter.b.shape[1], -1).T
        b = on_rows(adapter.b, fraction, lambda rows: misread)
        return F.linear(F.linear(x, adapter.a), b) * adapter.scaling

    change_adapter(run, layer, product)


def bypassed(run: Run, layer: str, fraction: float) -> None:
    change_adapter(run, layer, lambda x, adapter: on_rows(added(x, adapter), fraction, lambda rows: 0 * rows))


def da_loses_positions(run: Run, layer: str, fraction: float) -> None:
    def product(x: Tensor, adapter: Adapter) -> Tensor:
        lost = F.linear(x, adapter.a.detach()).flatten(0, -2)
        h = on_rows(F.linear(x, adapter.a), fraction, lambda rows: lost)
        return F.linear(h, adapter.b) * adapter.scaling

    change_adapter(run, layer, product)


def _db_from(h: Tensor, other: Tensor, b: Tensor) -> Tensor:
    """h @ b.T, with dB as if `other` had been multiplied. The difference of equal products is an exact zero."""
    imitation = F.linear(other.detach(), b)
    return F.linear(h, b.detach()) + (imitation - imitation.detach())


def db_from_rounded(run: Run, layer: str, bits_lost: float) -> None:
    """What is saved for dB, x A^T, is kept in fewer bits."""

    def product(x: Tensor, adapter: Adapter) -> Tensor:
        h = F.linear(x, adapter.a)
        return _db_from(h, rounded(h, bits_lost), adapter.b) * adapter.scaling

    change_adapter(run, layer, product)


def db_from_stale_a(run: Run, layer: str, micro_steps: float) -> None:
    """dB comes from a copy of A that is renewed once in so many micro-steps."""
    kept = copy_kept(run, micro_steps)

    def product(x: Tensor, adapter: Adapter) -> Tensor:
        return _db_from(F.linear(x, adapter.a), F.linear(x, kept(adapter.a)), adapter.b) * adapter.scaling

    change_adapter(run, layer, product)


def rank_cut(run: Run, layer: str, fraction: float) -> None:
    """The last ranks take no part: a tile that does not reach the end."""

    def product(x: Tensor, adapter: Adapter) -> Tensor:
        kept = adapter.a.shape[0] - max(1, round(fraction * adapter.a.shape[0]))
        used = (torch.arange(adapter.a.shape[0], device=x.device) < kept).to(x.dtype)
        return F.linear(F.linear(x, adapter.a) * used, adapter.b) * adapter.scaling

    change_adapter(run, layer, product)


# What is not an adapter's own.


def _up_projections(model: nn.Module) -> list[str]:
    return named(model, ".up_proj")


def dx_added_twice(run: Run, layer: str, fraction: float) -> None:
    """gate_proj and up_proj share an input; for some positions up_proj's gradient is added to it twice."""

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x: original(bend_gradient(x, lambda dx: on_rows(dx, fraction, lambda rows: 2 * rows)))

    override(run.model, pick(_up_projections(run.model), layer), "forward", make)


def nothing_trains_below(run: Run, layer: str, fraction: float) -> None:
    """A layer passes no gradient down for some positions, or at all: what re-entrant checkpointing does to LoRA."""
    layers = [name for name, _ in run.model.named_modules() if re.search(r"layers\.\d+$", name)][1:]
    above = pick(layers, layer)

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, **options) -> Tensor:
            cut = hidden_states.detach()
            rows = cut if fraction == 1 else on_rows(hidden_states, fraction, lambda rows: cut.view_as(rows))
            return original(rows, **options)

        return forward

    override(run.model, above, "forward", make)


def garbage_row(run: Run, layer: str, size: float) -> None:
    """The middle row of one gradient gains garbage of `size` times what its elements are on average."""
    name = pick(matrices(run), layer)

    def micro_step(original: Callable[..., Tensor], *arguments) -> Tensor:
        loss = original(*arguments)
        gradient = run.optimizer.gradients()[name]
        if gradient is not None:
            sign = 1 - 2.0 * (torch.arange(gradient.shape[1], device=gradient.device) % 2)
            gradient[len(gradient) // 2] += size * gradient.square().mean().sqrt() * sign
        return loss

    around_micro_step(run, micro_step)


def down_projection_off(run: Run, layer: str, error: float) -> None:
    bend_output(run.model, pick(named(run.model, ".down_proj"), layer), lambda out, x: out * (1 + error))


_mutant = partial(Planted, family="lora", kind="mutant")
_lora = partial(_mutant, methods=("lora",))

PLANTED = (
    _lora("lora_scale_off", summary="an adapter's output scaled wrongly", modelled_on="peft 1612", plant=scale_off,
          magnitudes=(0.01, 0.1), unit="relative scale"),
    _lora("lora_scaled_again_backwards", summary="alpha / rank applied twice to dB",
          modelled_on="unsloth 5036 (divided by accumulation twice)", plant=scaled_again_backwards,
          magnitudes=(0.01, 1.0), unit="part of the second factor"),
    _lora("lora_dx_incomplete", summary="dX misses part of the adapter's path",
          modelled_on="fms-acceleration 97, without dropout", plant=dx_incomplete,
          magnitudes=(0.1, 1.0), unit="part of the adapter's dX"),
    _lora("lora_wrong_stride", summary="rows of B read with the wrong stride", modelled_on="unsloth-zoo 1269",
          plant=wrong_stride, magnitudes=(0.02, 0.25), unit="fraction of rows of B"),
    _lora("lora_bypassed", summary="a fused path leaves out the adapter for some positions", modelled_on="peft 1612",
          plant=bypassed, magnitudes=(0.02, 0.25), unit="fraction of positions"),
    _lora("lora_da_loses_positions", summary="dA without the contribution of some positions",
          modelled_on="pytorch 193061 (parts of a gradient unwritten)", plant=da_loses_positions,
          magnitudes=(0.02, 0.25), unit="fraction of positions"),
    _lora("lora_db_from_rounded", summary="dB from an fp8 copy of x A^T", modelled_on="Liger 830 (dW from rounded chunks)",
          plant=db_from_rounded, magnitudes=(20, 21), unit="mantissa bits lost"),
    _lora("lora_db_from_stale_a", summary="dB from a copy of A that is out of date", modelled_on="TransformerEngine 2018",
          plant=db_from_stale_a, magnitudes=(4, 1000), unit="micro-steps a copy is kept"),
    _lora("lora_rank_cut", summary="the last ranks unused", modelled_on="unsloth-zoo 1269", plant=rank_cut,
          magnitudes=(0.02, 0.5), unit="fraction of ranks"),
    _mutant("dx_added_twice", summary="the gradient of a shared input added twice for some positions",
            modelled_on="torchtitan 3174 (tied gradient doubled)", plant=dx_added_twice,
            magnitudes=(0.02, 0.25), unit="fraction of positions"),
    _mutant("nothing_trains_below", summary="no gradient passes a layer, for some positions or any",
            modelled_on="transformers 21381", plant=nothing_trains_below,
            magnitudes=(0.1, 1.0), unit="fraction of positions"),
    _mutant("garbage_row", summary="one garbage row in one gradient", modelled_on="FLA 862 (uninitialised gradient)",
            plant=garbage_row, magnitudes=(0.3, 3.0), unit="of the gradient's root mean square"),
    _mutant("down_projection_off", summary="one projection's output scaled wrongly",
            modelled_on="torchao 4652 (a wrong store in one kernel)", plant=down_projection_off,
            magnitudes=(0.01, 0.1), unit="relative scale"),
)  # fmt: skip
