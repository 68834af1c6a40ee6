"""Where in the network two arms begin to differ: hidden states at every layer forward, their gradients backward."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from abtest.probes import documents, repack
from loop.batch import PackedBatch
from loop.files import write_safetensors
from loop.model import canonical_name, forward_body
from loop.run import Run


def places(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that are traced, in the order of the forward pass: embedding, decoder layers with what mixes tokens and
    channels in them, last norm. A fused layer without such parts is traced as a whole."""
    body = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is body)
    found = {f"{prefix}.embed_tokens": model.get_input_embeddings()}
    for index, layer in enumerate(body.layers):
        inside = (
            (f".{name}", module) for name, module in layer.named_children() if name in ("linear_attn", "self_attn", "mlp")
        )
        for name, module in (*inside, ("", layer)):
            found[f"{prefix}.layers.{index}{name}"] = module
    found[f"{prefix}.norm"] = body.norm
    return {canonical_name(name): module for name, module in found.items()}


POSITIONS = 1024  # at most, so that the hidden states of all layers make a file of a bearable size


def trace(run: Run, batch: PackedBatch, path: Path) -> None:
    """Writes every place's output ("forward NAME") and the gradient that arrives there ("backward NAME"), for the first
    documents of `batch`."""
    batch = repack(documents(batch), 1, min(POSITIONS, batch.positions))
    kept: dict[str, Tensor] = {}
    handles = []
    for name, module in places(run.model).items():
        handles.append(module.register_forward_hook(_keep(kept, name)))
    batch = batch.to(run.device)
    try:
        run.optimizer.zero_grad()
        loss = run.loss_head(run.model, forward_body(run.model, batch), batch)
        (loss / max(batch.supervised_tokens, 1)).backward()
    finally:
        for handle in handles:
            handle.remove()
    run.optimizer.zero_grad()
    write_safetensors(path, {name: value.contiguous() for name, value in kept.items()})


def _keep(kept: dict[str, Tensor], name: str):
    def hook(module: nn.Module, arguments: object, output) -> None:
        out = output[0] if isinstance(output, tuple) else output
        if f"forward {name}" in kept:
            return  # a checkpointed layer runs again in the backward pass
        kept[f"forward {name}"] = out.detach().cpu().clone()
        if out.requires_grad:
            out.register_hook(arrived)

    def arrived(gradient: Tensor) -> None:
        kept.setdefault(f"backward {name}", gradient.detach().cpu().clone())

    return hook


def compare(reference: Path, candidate: Path, oracle: Path) -> list[dict]:
    """Rows in the order of computation: how far the candidate is from the reference at a place, relative to its norm, and
    beside it how far the reference is from the oracle. Places that one of them lacks are left out."""
    rows = []
    with safe_open(reference, "pt") as one, safe_open(candidate, "pt") as other, safe_open(oracle, "pt") as truth:
        both = set(one.keys()) & set(other.keys()) & set(truth.keys())
        order = [f"forward {name}" for name in _order(both, "forward")] + [
            f"backward {name}" for name in _order(both, "backward")[::-1]
        ]
        for key in order:
            a, b, exact = (side.get_tensor(key) for side in (one, other, truth))
            if a.shape == b.shape == exact.shape:
                phase, _, name = key.partition(" ")
                norm = max(float(a.double().norm()), 1e-300)
                rows.append({
                    "module": name, "phase": phase, "same_bits": bool(torch.equal(a, b)),
                    "relative": float((a.double() - b.double()).norm()) / norm,
                    "beside": float((a.double() - exact.double()).norm()) / norm,
                })  # fmt: skip
    return rows


def _order(keys: set[str], phase: str) -> list[str]:
    names = [key.partition(" ")[2] for key in keys if key.startswith(f"{phase} ")]
    return sorted(names, key=_place)


def _place(name: str) -> tuple[float, int]:
    """Embedding first, then layers by number with their parts before the whole, the last norm at the end."""
    _, _, tail = name.partition(".layers.")
    if not tail:
        return (-1.0, 0) if name.endswith("embed_tokens") else (1e9, 0)
    index, _, part = tail.partition(".")
    return float(index), {"linear_attn": 0, "self_attn": 0, "mlp": 1}.get(part, 2)
