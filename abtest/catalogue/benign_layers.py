"""Honest rewrites of what is between the products: norms, the gated MLP, attention, rope, the delta layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abtest.catalogue.benign import benign, no_dropout
from abtest.catalogue.patching import named, names_of, override, use_attention, wide
from abtest.catalogue.planted import Planted
from kernels.silu_mul.patch import FusedMLP, is_gated_silu_mlp
from loop import delta_net
from loop.delta_net import CHUNK, Pack
from loop.run import Run

PLAIN_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")  # scaled by w
ZERO_CENTRED_NORMS = ("Qwen3_5RMSNorm",)  # scaled by 1 + w
HIDDEN = -1e30  # of a score: its exponential is 0 beside any other, and a block of nothing else is still finite
KEYS = 64  # in a block of attention


# Norms: x [..., D] -> [..., D]; everything in fp32, rounded once.


def norm_by_hand(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """A sum times 1/D, and a division by a root, where the reference has a mean and a reciprocal root."""
    x = wide(x)
    mean = (x * x).sum(-1, keepdim=True) * (1 / x.shape[-1])
    return x / (mean + eps).sqrt() * scale


class _ClosedForm(torch.autograd.Function):
    """With y = r x s and r = (mean(x^2) + eps)^-1/2: dx = r (dy s - x r^2 mean(dy s x)), ds = sum of dy r x over rows."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        r = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, scale, r)
        return x * (r * scale)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale, r = ctx.saved_tensors
        dx = r * (dy * scale - x * (r * r * (dy * scale * x).mean(-1, keepdim=True)))
        return dx, (dy * (r * x)).flatten(0, -2).sum(0), None


def norm_in_closed_form(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return _ClosedForm.apply(wide(x), scale, eps)


def _norms(function: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        for offset, kinds in ((0.0, PLAIN_NORMS), (1.0, ZERO_CENTRED_NORMS)):
            for name in names_of(run.model, *kinds):
                norm = run.model.get_submodule(name)
                eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon

                def forward(x: Tensor, norm: nn.Module = norm, offset: float = offset, eps: float = eps) -> Tensor:
                    return function(x, wide(norm.weight) + offset, eps).to(x.dtype)

                override(run.model, name, "forward", lambda _, forward=forward: forward)

    return change


def _gated_norms(run: Run) -> None:
    for name in names_of(run.model, "Qwen3_5RMSNormGated"):
        norm = run.model.get_submodule(name)

        def forward(x: Tensor, gate: Tensor, norm: nn.Module = norm) -> Tensor:
            gate, scaled = wide(gate), norm_by_hand(x, wide(norm.weight), norm.variance_epsilon)
            return (scaled * gate * gate.sigmoid()).to(x.dtype)

        override(run.model, name, "forward", lambda _, forward=forward: forward)


def _has(*kinds: str) -> Callable[[Run], str | None]:
    return lambda run: None if names_of(run.model, *kinds) else f"the model has no {' or '.join(kinds)}"


# The gated MLP.


def _mlps(run: Run) -> list[str]:
    return [name for name, m in run.model.named_modules() if name and (isinstance(m, FusedMLP) or is_gated_silu_mlp(m))]


def _silu_in_fp32(run: Run) -> None:
    for name in _mlps(run):
        mlp = run.model.get_submodule(name)

        def forward(x: Tensor, mlp: nn.Module = mlp) -> Tensor:
            gate = wide(mlp.gate_proj(x))
            return mlp.down_proj((gate * gate.sigmoid() * wide(mlp.up_proj(x))).to(x.dtype))

        override(run.model, name, "forward", lambda _, forward=forward: forward)


# Attention: query [B, heads, L, D], key and value [B, kv heads, L, D] -> ([B, L, heads, D], None).


def _visible(query: Tensor, pack: Pack | None, window: int | None) -> Tensor:
    """Which key each query sees, bool [B, 1, L, L]: those of its document up to itself, the last `window` of them."""
    B, _, L, _ = query.shape
    t = torch.arange(L, device=query.device)
    near = (t[:, None] >= t) if window is None else (t[:, None] >= t) & (t[:, None] - t < window)
    if pack is None:  # every row is one document
        return near.expand(B, 1, L, L)
    lengths = torch.tensor(pack.lengths)
    document = torch.arange(len(lengths)).repeat_interleave(lengths).to(query.device).view(B, 1, L)
    return (document[..., None] == document[..., None, :]) & near


def _blockwise(block: int | None) -> Callable[..., tuple[Tensor, None]]:
    """Attention in fp32, rounded once; keys in blocks of `block`, or None for all at once."""

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        pack: Pack | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        copies, L = query.shape[1] // key.shape[1], key.shape[2]
        q = wide(query) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        k, v = (wide(x).repeat_interleave(copies, dim=1) for x in (key, value))
        scores = (q @ k.transpose(-1, -2)).masked_fill(~_visible(query, pack, sliding_window), HIDDEN)
        if block is None:
            out = scores.softmax(-1) @ v
        else:
            out = _merged(scores.split(block, -1), v.split(block, 2)) if block < L else scores.softmax(-1) @ v
        return out.transpose(1, 2).contiguous().to(query.dtype), None

    return attend


def _merged(scores: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> Tensor:
    """Each block's own softmax and result, weighted by its share of the exponentials."""
    sums = torch.stack([block.logsumexp(-1) for block in scores])
    parts = torch.stack([block.softmax(-1) @ value for block, value in zip(scores, values, strict=True)])
    return (sums.softmax(0)[..., None] * parts).sum(0)


def _attention(name: str, block: int | None) -> Callable[[Run], None]:
    return lambda run: use_attention(run, name, _blockwise(block), masks=None)


# Rope.


def _wider_rope(run: Run) -> None:
    """Angles in fp64; the rotation in the next wider type than the run's, and rounded once, before the scores."""
    from transformers import AttentionInterface

    for name in named(run.model, "rotary_emb"):
        rope = run.model.get_submodule(name)

        def forward(x: Tensor, position_ids: Tensor, rope: nn.Module = rope) -> tuple[Tensor, Tensor]:
            positions = position_ids[0] if position_ids.ndim == 3 else position_ids  # three grids, alike for text
            angles = positions[..., None].double() * rope.inv_freq.double()
            angles = torch.cat([angles, angles], -1)
            dtype = torch.float32 if x.dtype.itemsize < 4 else torch.float64
            return tuple((part * rope.attention_scaling).to(dtype) for part in (angles.cos(), angles.sin()))

        override(run.model, name, "forward", lambda _, forward=forward: forward)
    before = run.model.config._attn_implementation
    inner = AttentionInterface()[before]

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any):
        return inner(module, query.to(value.dtype), key.to(value.dtype), value, *arguments, **options)

    use_attention(run, f"{before}_after_wider_rope", attend, masks=before)


def _plain_rope(run: Run) -> str | None:
    ropes = [run.model.get_submodule(name) for name in named(run.model, "rotary_emb")]
    if not ropes or any(getattr(rope, "rope_type", None) != "default" for rope in ropes):
        return "the model has no rope of the default type"
    return None


# The delta layer.


def _convolve_by_shifts(run: Run) -> None:
    """A sum of shifted products in fp32, the activation with it, rounded once."""
    for name in names_of(run.model, "PackedDeltaNet"):
        layer = run.model.get_submodule(name)

        def convolve(x: Tensor, pack: Pack, layer: nn.Module = layer) -> Tensor:
            weight = wide(layer.conv1d.weight.squeeze(1))  # [C, width]
            width, parts = weight.shape[1], []
            for rows in pack.split(x):  # [documents, length, C]
                padded = F.pad(wide(rows), (0, 0, width - 1, 0))
                out = sum(padded[:, j : j + rows.shape[1]] * weight[:, j] for j in range(width))
                out = out if layer.conv1d.bias is None else out + wide(layer.conv1d.bias)
                parts.append((out * out.sigmoid()).to(x.dtype))
            return pack.join(parts)

        override(run.model, name, "convolve", lambda _, convolve=convolve: convolve)


def _delta_rule(chunk: int, normalise_first: bool) -> Callable[[Run], None]:
    """transformers' delta rule in fp32, `chunk` positions at a time."""

    def change(run: Run) -> None:
        for name in names_of(run.model, "PackedDeltaNet"):
            layer = run.model.get_submodule(name)

            def delta_rule(q, k, v, g, beta, pack: Pack, layer: nn.Module = layer) -> Tensor:
                rule, copies = delta_net._plain("torch_chunk_gated_delta_rule"), layer.num_v_heads // layer.num_k_heads
                if normalise_first:
                    q, k = (x / ((x * x).sum(-1, keepdim=True) + 1e-6).sqrt() for x in (wide(q), wide(k)))
                q, k = (x.repeat_interleave(copies, dim=2) for x in (q, k))
                groups = zip(*(pack.split(x) for x in (q, k, v, g, beta)), strict=True)
                options = {"chunk_size": chunk, "use_qk_l2norm_in_kernel": not normalise_first}
                return pack.join([rule(*rows, **options)[0].to(v.dtype) for rows in groups])

            override(run.model, name, "delta_rule", lambda _, delta_rule=delta_rule: delta_rule)

    return change


def _silu_delta(run: Run) -> str | None:
    layers = [run.model.get_submodule(name) for name in names_of(run.model, "PackedDeltaNet")]
    if not layers:
        return "the model has no gated-delta layers"
    return None if all(layer.activation == "silu" for layer in layers) else "the convolution's activation is not SiLU"


PLANTED: tuple[Planted, ...] = (
    benign("norm_by_hand", "RMSNorm's root and division, and the scale with them, in fp32, rounded once",
           "Liger's and Apex's RMSNorm kernels", _norms(norm_by_hand), _has(*PLAIN_NORMS, *ZERO_CENTRED_NORMS)),
    benign("norm_in_closed_form", "RMSNorm's backward pass by its formula, with other products and sums than autograd's",
           "FLA's, Liger's and quack's RMSNorm", _norms(norm_in_closed_form), _has(*PLAIN_NORMS, *ZERO_CENTRED_NORMS)),
    benign("silu_in_fp32", "gate * sigmoid(gate) * up in fp32, rounded once", "Liger's SwiGLU, this project's silu_mul",
           _silu_in_fp32, lambda run: None if _mlps(run) else "the model has no gated SiLU MLP"),
    benign("attention_in_fp32", "attention's scores, softmax and results in fp32, all keys at once, rounded once",
           "eager attention (transformers), math SDPA (PyTorch)", _attention("attention_in_fp32", None), no_dropout),
    benign("attention_by_key_blocks", "attention's sums over keys in blocks of 64, merged by their sums of exponentials",
           "FlashAttention, split-KV decoding, ring attention", _attention("attention_by_key_blocks", KEYS), no_dropout),
    benign("rope_wider", "rope's angles in fp64, the rotation in the next wider type and rounded once",
           "Liger's rope in fp32; transformers' issue 29285 asks for it", _wider_rope, _plain_rope),
    benign("convolution_by_shifts", "the short convolution as a sum of shifted products, and SiLU with it, rounded once",
           "Dao's causal-conv1d", _convolve_by_shifts, _silu_delta),
    benign("delta_rule_chunk_32", "the delta rule's sums within and across chunks of 32 positions, not 64",
           "FLA's choice of chunk by hardware", _delta_rule(CHUNK // 2, False), _has("PackedDeltaNet")),
    benign("delta_rule_normalised_before", "q and k divided by their norms in fp32 outside of the delta rule",
           "FLA without use_qk_l2norm_in_kernel", _delta_rule(CHUNK, True), _has("PackedDeltaNet")),
    benign("gated_norm_in_fp32", "the delta layer's norm, scale and gate in fp32, rounded once",
           "FLA's fused gated RMSNorm", _gated_norms, _has("Qwen3_5RMSNormGated")),
)  # fmt: skip
