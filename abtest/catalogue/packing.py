"""Defects of packing: what one document tells another in the same pack. Each lives in one layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from abtest.catalogue.patching import chosen, named, names_of, override, pick, present, value_with_gradient_of
from abtest.catalogue.planted import Planted
from loop.attention import REFERENCES
from loop.delta_net import Pack
from loop.run import Run

Inner = list[int]  # boundaries inside a pack: where its documents start, but for the first


def delta_layers(model: nn.Module) -> list[str]:
    return names_of(model, "PackedDeltaNet")


def _attentions(model: nn.Module) -> list[str]:
    return named(model, ".self_attn")


# Boundaries of the flattened positions, and so of rows too: a defect here goes past the end of a row.


def _rebound(pack: Pack, change: Callable[[Inner], Iterable[int]]) -> Pack:
    """The pack with other boundaries; several in one place are one."""
    first, *inner, last = pack.cu_seqlens_cpu.tolist()
    bounds = sorted({first, *change(inner), last})
    lengths = tuple(end - start for start, end in pairwise(bounds))
    return Pack(torch.tensor(bounds, dtype=torch.int32, device=pack.cu_seqlens.device), lengths)


def lost(fraction: float) -> Callable[[Pack], Pack]:
    """A fraction of the boundaries is not there."""
    return partial(_rebound, change=lambda inner: [b for index, b in enumerate(inner) if not chosen(index, fraction)])


def late(fraction: float) -> Callable[[Pack], Pack]:
    """A fraction of the boundaries comes a token late."""
    return partial(_rebound, change=lambda inner: [b + chosen(index, fraction) for index, b in enumerate(inner)])


def on_grid(tile: int) -> Callable[[Pack], Pack]:
    """Boundaries come early, at the last multiple of `tile`."""
    return partial(_rebound, change=lambda inner: [b // tile * tile for b in inner])


def _with_pack(run: Run, layer: str, change: Callable[[Pack], Pack], *methods: str) -> None:
    """Methods of one delta layer get `change(pack)`, their last argument."""
    name = pick(delta_layers(run.model), layer)
    for method in methods:
        override(run.model, name, method, lambda original: lambda *inputs: original(*inputs[:-1], change(inputs[-1])))


def state_leak(run: Run, layer: str, fraction: float) -> None:
    """Boundaries reach the convolution, but a fraction of them doesn't reach the delta rule."""
    _with_pack(run, layer, lost(fraction), "delta_rule")


def conv_leak(run: Run, layer: str, fraction: float) -> None:
    """Boundaries reach the delta rule, but a fraction of them doesn't reach the convolution."""
    _with_pack(run, layer, lost(fraction), "convolve")


def boundaries_dropped(run: Run, layer: str, fraction: float) -> None:
    """A fraction of the boundaries is dropped on the way to one layer."""
    _with_pack(run, layer, lost(fraction), "convolve", "delta_rule")


def boundaries_late(run: Run, layer: str, fraction: float) -> None:
    _with_pack(run, layer, late(fraction), "convolve", "delta_rule")


def resets_on_grid(run: Run, layer: str, tile: float) -> None:
    """The state is reset at the start of the tile that a document starts in, and so inside the document before."""
    _with_pack(run, layer, on_grid(int(tile)), "delta_rule")


def state_leaks_faded(run: Run, layer: str, part: float) -> None:
    """Part of the state outlives every boundary."""

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, pack: Pack) -> Tensor:
            fade = g.new_zeros(g.shape[1]).index_fill_(0, pack.cu_seqlens[1:-1].long(), math.log(part))
            return original(q, k, v, g + fade[:, None], beta, lost(1.0)(pack))

        return delta_rule

    override(run.model, pick(delta_layers(run.model), layer), "delta_rule", make)


def backward_state_leak(run: Run, layer: str, fraction: float) -> None:
    """Forward everything is right; backward a fraction of the boundaries is missing from the delta rule."""

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def delta_rule(*inputs) -> Tensor:
            with torch.no_grad():
                right = original(*inputs)
            return value_with_gradient_of(right, original(*inputs[:-1], lost(fraction)(inputs[-1])))

        return delta_rule

    override(run.model, pick(delta_layers(run.model), layer), "delta_rule", make)


# Attention.


def _starts(position_ids: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """bool [B, L] twice: where documents start, and which of those boundaries inside a row something is wrong with."""
    starts = position_ids == 0
    document = starts.long().cumsum(-1) - 1
    return starts, starts & (document > 0) & chosen(document - 1, fraction)


def attention_leak(run: Run, layer: str, fraction: float) -> None:
    """One layer attends across a fraction of the boundaries inside a row, though positions restart there."""

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(*inputs, attention_mask: Tensor | None, position_ids: Tensor, **options):
            if attention_mask is not None:  # None: every row is one document
                starts, missing = _starts(position_ids, fraction)
                joined = (starts & ~missing).long().cumsum(-1)
                same = joined[:, None, :, None] == joined[:, None, None, :]
                attention_mask = attention_mask | same.tril()
            return original(*inputs, attention_mask=attention_mask, position_ids=position_ids, **options)

        return forward

    override(run.model, pick(_attentions(run.model), layer), "forward", make)


def positions_restart_late(run: Run, layer: str, fraction: float) -> None:
    """In a fraction of the documents the first token has the position of the last one before; the rest start at 1.

    Positions that never restart would change nothing where documents are masked: attention sees their differences.
    """

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(*inputs, position_embeddings: tuple[Tensor, Tensor], position_ids: Tensor, **options):
            wrong = _starts(position_ids, fraction)[1][..., None]
            tables = tuple(torch.where(wrong, table.roll(1, -2), table) for table in position_embeddings)
            return original(*inputs, position_embeddings=tables, position_ids=position_ids, **options)

        return forward

    override(run.model, pick(_attentions(run.model), layer), "forward", make)


def _masked_attention(run: Run) -> str | None:
    if run.model.config._attn_implementation not in REFERENCES:
        return f"attention is {run.model.config._attn_implementation}, which doesn't go by a mask"
    return None if _attentions(run.model) else "the model has no attention"


_mutant = partial(Planted, family="packing", kind="mutant", magnitudes=(0.25, 1.0), unit="fraction of boundaries")
_delta = partial(_mutant, eligible=present(delta_layers, "delta layers"))

PLANTED = (
    _delta("state_leak", summary="delta-rule state carried across boundaries that the convolution sees",
           modelled_on="slime 1686, NeMo Automodel 2147", plant=state_leak),
    _delta("conv_leak", summary="the convolution reads over boundaries that the delta rule sees",
           modelled_on="NeMo Automodel 2147", plant=conv_leak),
    _delta("boundaries_dropped", summary="cu_seqlens dropped on the way to one layer",
           modelled_on="ms-swift 9618, transformers 46093, FLA 842", plant=boundaries_dropped),
    _delta("boundaries_late", summary="documents start a token late in one layer",
           modelled_on="torchtitan 4075 (the token at a boundary counted to the wrong document)", plant=boundaries_late),
    _delta("resets_on_grid", summary="the state is reset at tiles, not at boundaries",
           modelled_on="FLA 842 (something else overrides cu_seqlens)", plant=resets_on_grid,
           magnitudes=(4, 64), unit="tokens a tile"),
    _delta("state_leaks_faded", summary="a part of the state crosses every boundary", modelled_on="prime-rl 3002",
           plant=state_leaks_faded, magnitudes=(0.1, 0.5), unit="part of the state"),
    _delta("backward_state_leak", summary="cu_seqlens missing from the delta rule's backward alone",
           modelled_on="slime 1686 (cu_seqlens to one op and not to the next)", plant=backward_state_leak),
    _mutant("attention_leak", summary="attention across documents whose positions restart", modelled_on="nanoVLM 204",
            plant=attention_leak, eligible=_masked_attention),
    _mutant("positions_restart_late", summary="positions restart a token late",
            modelled_on="nanoVLM 204, torchtitan 4075", plant=positions_restart_late,
            eligible=present(_attentions, "attention with rotary positions")),
)  # fmt: skip
