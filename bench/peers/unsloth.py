"""Unsloth's FastLanguageModel on the run's own weights, fed and cast as its SFTTrainer would.

Unsloth patches transformers while it is imported, so it comes first in its process; the run's model is made in another one
(`bench.peers.export`) and comes as a folder. Adapters are Unsloth's, in fp32 under autocast, with the run's values copied
in; full fine-tuning is without autocast of ours, since Unsloth casts by itself. Written for unsloth 2026.10.7 and later.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.peers import Peer
from bench.peers.export import ADAPTERS, MODEL, export
from bench.peers.ready import Ready, Unavailable, flattened, one_text
from loop import lora
from loop.batch import PackedBatch
from loop.config import Config
from loop.model import resolve_device, trainable


def build(peer: Peer, config: Config) -> Ready:
    """Raises Unavailable where Unsloth would not pack this model, UserError for adapters elsewhere than the run's."""
    folder = ahead(config)
    try:
        model = _load(peer, config, folder)
    finally:
        ahead.cache_clear()
        shutil.rmtree(folder, ignore_errors=True)
    inner = inside(model)
    took = {
        "attention": str(inner.config._attn_implementation),
        "recomputed": "as Unsloth does" if peer.checkpointing else "nothing",
        "trained": sorted({str(p.dtype).removeprefix("torch.") for p in trainable(inner).values()}),
        "packed": "no: every pack is one text" if peer.wrapped else _pack(model, inner),
    }
    dtype = resolve_device(config)[1]
    autocast = dtype if config.method == "lora" and dtype != torch.float32 else None
    observed = functools.partial(_observed, inner)
    return Ready(inner, model, one_text if peer.wrapped else packed, autocast, took, eager=False, observed=observed)


@functools.cache
def ahead(config: Config) -> Path:
    """Where the run's weights are written, once for a configuration; Unsloth is imported then, too."""
    folder = _folder("isoloss-unsloth-")
    export(config, folder)
    _settle()
    import unsloth  # noqa: F401  # before transformers, which it patches

    return folder


def packed(batch: PackedBatch) -> dict[str, Any]:
    """What Unsloth's collator gives for packed rows: one row, position ids that restart, and the documents' lengths."""
    rows = flattened(batch)
    kept = {name: rows[name] for name in ("input_ids", "labels", "position_ids")}
    return kept | {"packed_seq_lengths": batch.cu_seqlens.diff()}


def inside(model: nn.Module) -> nn.Module:
    """The transformers model within PEFT's wrapper, or the model itself."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def _settle() -> None:
    """Unsloth's code goes to a folder that ends with this process, and nothing is asked of the network."""
    os.environ["UNSLOTH_COMPILE_LOCATION"] = str(_folder("isoloss-unsloth-code-"))
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"


def _folder(prefix: str) -> Path:
    """A temporary one, which ends with this process at the latest."""
    folder = tempfile.mkdtemp(prefix=prefix)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _load(peer: Peer, config: Config, folder: Path) -> nn.Module:
    from unsloth import FastLanguageModel

    checkpointing = "unsloth" if peer.checkpointing else False
    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(folder / MODEL),
        max_seq_length=config.data.pack_length * config.data.packs_per_micro_step,
        dtype=resolve_device(config)[1],
        load_in_4bit=False,
        full_finetuning=config.method == "full",
        use_gradient_checkpointing=checkpointing,
        offload_embedding=False,
        random_state=config.seed,
    )
    if config.method == "lora":
        settings = json.loads((folder / ADAPTERS / lora.ADAPTER_CONFIG).read_text(encoding="utf-8"))
        alpha = config.lora.alpha
        model = FastLanguageModel.get_peft_model(
            model,
            r=config.lora.rank,
            target_modules=settings["target_modules"],
            lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
            lora_dropout=config.lora.dropout,
            bias="none",
            use_gradient_checkpointing=checkpointing,
            random_state=config.seed,
        )
        lora.load_adapters(inside(model), folder / ADAPTERS, trainable(inside(model)))
    FastLanguageModel.for_training(model)
    return model


def _pack(model: nn.Module, inner: nn.Module) -> str:
    """Switches Unsloth's sample packing on, as its SFTTrainer does for `packing=True`. Raises Unavailable where Unsloth
    keeps to padded rows."""
    from unsloth.utils import packing
    from unsloth.utils.hf_packed_attention import enable_hf_packed_attention

    hybrid = "linear_attention" in (getattr(inner.config, "layer_types", None) or ())
    if hybrid and not packing.patch_hybrid_linear_attention_varlen(model):
        why = "; ".join(sorted(getattr(packing, "_HYBRID_WARNED", ()))) or "it gives no reason"
        raise Unavailable(f"Unsloth pads this model here and does not pack it: {why}")
    packing.mark_allow_overlength(model)
    attention = "its varlen attention" if enable_hf_packed_attention() else "attention masks"
    return f"boundaries to the delta rule and convolution, and {attention}" if hybrid else attention


def _observed(inner: nn.Module) -> dict[str, Any]:
    """How the decoder layers ran in the first step, by Unsloth's own marks, and which attention calls took its fast path."""
    calls = getattr(sys.modules.get("unsloth.utils.hf_packed_attention"), "HF_PACKED_ATTENTION_STATS", {})
    modes = Counter(
        str(vars(module)["_unsloth_block_mode"]) for module in inner.modules() if "_unsloth_block_mode" in vars(module)
    )
    names = {"0": "as transformers has it", "1": "compiled whole", "2": "compiled around attention"}
    return {
        "decoder layers": {names.get(mode, mode): count for mode, count in sorted(modes.items())},
        "packed attention calls": dict(calls),
    }
