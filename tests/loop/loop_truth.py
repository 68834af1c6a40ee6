"""The truth the loop is compared with: a transformers model as transformers makes it, one document at a time.

Nothing of the loop's model code is used: no packing, no swapped layer, no PEFT. Adapters are added to the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from loop.batch import IGNORE, PackedBatch
from loop.lora import adapters
from loop.run import Run

TINY = ("qwen3.5-tiny", "qwen3-tiny", "qwen2-tiny", "llama-tiny", "mistral-tiny")


def plain_model(run: Run, dtype: torch.dtype = torch.float32, attention: str = "eager") -> nn.Module:
    """transformers' own class with the run's base weights, no adapters, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(run.model.config, attn_implementation=attention)
    weights = {name.replace(".base_layer.", "."): value for name, value in run.model.state_dict().items()}
    weights = {name: value for name, value in weights.items() if ".lora_" not in name}
    missing = model.load_state_dict(weights, strict=True)
    assert not missing.missing_keys and not missing.unexpected_keys
    return model.to(dtype).eval()


def stir_adapters(run: Run, seed: int = 1) -> None:
    """Random B instead of zeros: with B = 0 the gradient of A is zero and adapters change nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters(run.model):
            adapter.b.copy_(torch.randn(adapter.b.shape, generator=generator) * 0.05)


def spans(batch: PackedBatch) -> Iterator[tuple[int, int]]:
    """Start and end of every document in the flattened positions."""
    yield from pairwise(batch.cu_seqlens.tolist())


def unpacked_step(run: Run, batch: PackedBatch, dtype: torch.dtype) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss sum, and gradients of (loss sum / supervised tokens) by canonical name, from documents run alone."""
    model = plain_model(run, dtype)
    leaves = {name: p.detach().to(dtype).requires_grad_() for name, p in run.optimizer.parameters.items()}
    total = 0.0
    for start, end in spans(batch):
        labels = batch.labels.flatten()[start:end]
        if not bool((labels != IGNORE).any()):
            continue
        weights = _with_adapters(run, model, leaves) if run.config.method == "lora" else leaves
        ids = batch.input_ids.flatten()[None, start:end]
        logits = torch.func.functional_call(model, weights, (), {"input_ids": ids, "use_cache": False}).logits
        loss = F.cross_entropy(logits[0].to(dtype), labels, ignore_index=IGNORE, reduction="sum")
        (loss / batch.supervised_tokens).backward()
        total += float(loss.detach())
    return total, {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in leaves.items()}


def _with_adapters(run: Run, model: nn.Module, leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Merged weights W + alpha / rank * B A, differentiable in A and B."""
    scale = run.config.lora.alpha / run.config.lora.rank
    merged = {}
    for name in leaves:
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            delta = leaves[f"{module}.lora_B.weight"] @ leaves[name] * scale
            merged[f"{module}.weight"] = model.get_parameter(f"{module}.weight").detach() + delta
    return merged


def packed_step(run: Run, batch: PackedBatch) -> tuple[float, dict[str, torch.Tensor]]:
    """The loop's own micro-step: loss sum and gradients by canonical name."""
    run.optimizer.zero_grad()
    loss = float(run.micro_step(run, batch, batch.supervised_tokens))
    gradients = {name: g.clone() for name, g in run.optimizer.gradients().items() if g is not None}
    run.optimizer.zero_grad()
    return loss, gradients


def worst_error(gradients: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest error of a tensor, as a norm, relative to that tensor's norm and a floor of the whole gradient's.

    The floor, 1e-4 of the norm of all, keeps a tensor that is almost zero from counting its rounding as an error.
    """
    floor = 1e-4 * torch.sqrt(sum(g.double().square().sum() for g in truth.values()))
    errors = {
        name: float((gradients[name].double() - g.double()).norm() / torch.maximum(g.double().norm(), floor))
        for name, g in truth.items()
    }
    name = max(errors, key=errors.get)
    return errors[name], name
