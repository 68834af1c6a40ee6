"""The model: a transformers causal language model from a folder, a hub id or a named shape, on its pure-PyTorch path."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from loop.attention import use_repeatable_attention
from loop.batch import IGNORE, PackedBatch
from loop.config import Config
from loop.delta_net import Pack, isolate_documents
from loop.errors import UserError
from loop.shapes import SHAPES, is_tiny

if TYPE_CHECKING:
    from loop.run import Run

FAST_PATHS = ("fla", "causal_conv1d")  # what transformers binds at import when it finds it


def resolve_device(config: Config) -> tuple[torch.device, torch.dtype]:
    """The device and compute dtype of a run; "auto" is CUDA in bf16 where there is a GPU, else the CPU in fp32."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device on this machine; use --device cpu or auto")
    dtype = config.dtype if config.dtype != "auto" else ("bfloat16" if name == "cuda" else "float32")
    return torch.device(name), getattr(torch, dtype)


@contextmanager
def hidden_fast_paths() -> Iterator[None]:
    """transformers imported inside sees neither FLA nor causal-conv1d: bound silently, they would change the reference."""
    saved = {name: sys.modules[name] for name in FAST_PATHS if name in sys.modules}
    for name in FAST_PATHS:
        sys.modules[name] = None  # type: ignore[assignment]  # the import system's own way of saying "not there"
    try:
        yield
    finally:
        for name in FAST_PATHS:
            del sys.modules[name]
        sys.modules.update(saved)


def checkpoint_folder(model: str) -> str | None:
    """None for a named shape, else `model` itself. Raises UserError for a path that is not there."""
    if model in SHAPES:
        return None
    looks_local = Path(model).is_absolute() or model.startswith((".", "~")) or "/" not in model
    if looks_local and not Path(model).expanduser().is_dir():
        raise UserError(f"--model {model}: no such folder, and no named shape; the named shapes are {', '.join(SHAPES)}")
    if looks_local and not (Path(model).expanduser() / "config.json").is_file():
        raise UserError(f"--model {model}: the folder has no config.json; a transformers checkpoint folder is expected")
    return str(Path(model).expanduser()) if looks_local or Path(model).is_dir() else model


def load_model(config: Config, vocab_size: int) -> nn.Module:
    """Builds the model on its device, in its compute dtype, with documents kept apart, in training mode.

    Random weights depend on `config.seed` and the device alone. `vocab_size` sizes the tiny shapes; any other model must
    have at least that many embeddings. Raises UserError for a model that can't be loaded.
    """
    from transformers.utils import logging as transformers_logging

    device, dtype = resolve_device(config)
    folder = checkpoint_folder(config.model)
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)  # its fallback warnings tell users to install the fast path
    with hidden_fast_paths():
        model = _from_shape(config, vocab_size, device, dtype) if folder is None else _from_checkpoint(folder, dtype)
    model.to(device)
    have = model.get_input_embeddings().num_embeddings
    if have < vocab_size:
        raise UserError(f"--model {config.model}: {have} embeddings, but the tokenizer has {vocab_size} tokens")
    isolate_documents(model)
    if config.repeatable_attention:
        use_repeatable_attention(model)
    model.config.use_cache = False
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _from_shape(config: Config, vocab_size: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, shape = SHAPES[config.model]
    if is_tiny(config.model):
        shape = shape | {"vocab_size": vocab_size}
    torch.manual_seed(config.seed)
    with device:
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(model_type, **shape), dtype=dtype, attn_implementation="sdpa"
        )


def _from_checkpoint(folder: str, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa", use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--model {folder}: can't be loaded: {str(error).splitlines()[0]}") from error


def forward_body(model: nn.Module, batch: PackedBatch, pack: Pack | None = None) -> torch.Tensor:
    """The last hidden states [B, L, D] of a packed batch, documents isolated. pack: given to the layers in place of the
    batch's own.

    Attention is kept apart by transformers' own block-diagonal mask, which it derives from position ids that restart;
    the gate compares with unpacked documents and so would see a version that stops doing that.
    """
    body = model.get_decoder()
    pack = Pack.of(batch) if pack is None else pack
    out = body(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, pack=pack)
    return out.last_hidden_state


def cross_entropy_head(model: nn.Module, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """The reference loss head: logits of every position, then the fp32 sum of cross-entropy over supervised ones."""
    logits = model.get_output_embeddings()(hidden).float()
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum")


def plain_micro_step(run: Run, batch: PackedBatch, step_supervised_tokens: int, pack: Pack | None = None) -> torch.Tensor:
    """Forward and backward of one micro-batch; returns the detached fp32 loss sum. pack: as in `forward_body`.

    Gradients are of the sum divided by the supervised tokens of the whole *step*, so micro-steps add up to the gradient
    of one large batch however unevenly they are supervised.
    """
    loss_sum = run.loss_head(run.model, forward_body(run.model, batch, pack), batch)
    (loss_sum / max(step_supervised_tokens, 1)).backward()
    return loss_sum.detach()


def canonical_name(name: str) -> str:
    """A parameter's name whichever module computes it: PEFT's adapter name is dropped."""
    return name.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by canonical name, in the model's order, tied ones once."""
    return {canonical_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def implementation_paths(model: nn.Module) -> dict[str, Any]:
    """Which implementation each kind of layer runs on, for the record: module class -> count."""
    kinds: dict[str, int] = {}
    for module in model.modules():
        kind = f"{type(module).__module__}.{type(module).__name__}"
        if not kind.startswith("torch.nn."):
            kinds[kind] = kinds.get(kind, 0) + 1
    return dict(sorted(kinds.items())) | {"attention": model.config._attn_implementation}
