"""transformers and PEFT as installed, and what their Trainer does with them.

PEFT keeps the adapters of a bf16 model in fp32, and Trainer's `bf16=True` runs the forward under autocast; so does this.
Full fine-tuning has bf16 weights and no autocast, the faster of what a user may choose.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import nn

from bench.peers import Peer
from bench.peers.ready import Ready, bound_kernels, flattened, modelling_of
from loop import attention, lora
from loop.config import Config
from loop.data import load_tokenizer
from loop.delta_net import PackedDeltaNet
from loop.model import checkpoint_folder, hidden_fast_paths, load_model, resolve_device, trainable


def build(peer: Peer, config: Config) -> Ready:
    """transformers on its pure-PyTorch path: neither FLA nor causal-conv1d is there for it."""
    with hidden_fast_paths():
        modelling_of(config)
    return stock(peer, config)


def stock(peer: Peer, config: Config) -> Ready:
    """The run's model and adapters as transformers and PEFT compute them, with whatever the modelling file has bound.

    With `config.repeatable_attention` the gate sees the reference's attention, which repeats itself, and the clock sees
    transformers' own, as with every arm.
    """
    vocabulary = len(load_tokenizer(checkpoint_folder(config.model), config.data))
    model = load_model(dataclasses.replace(config, gradient_checkpointing=False), vocabulary)
    give_back(model)
    autocast = None
    if config.method == "lora":
        autocast = attach(model, config)
    if peer.checkpointing:
        model.gradient_checkpointing_enable()  # with no arguments of its own, as Trainer calls it
    took = {
        "bound": bound_kernels(modelling_of(config)),
        "attention": attention.PLAIN,
        "recomputed": "every layer" if peer.checkpointing else "nothing",
        "autocast": str(autocast).removeprefix("torch."),
        "trained": sorted({str(p.dtype).removeprefix("torch.") for p in trainable(model).values()}),
    }
    return Ready(model, model, functools.partial(_inputs, model), autocast, took)


def _inputs(model: nn.Module, batch) -> dict:
    return flattened(batch, with_pack=model.config._attn_implementation == attention.NAME)


def attach(model: nn.Module, config: Config) -> torch.dtype | None:
    """PEFT's adapters with the run's values, in fp32 as PEFT keeps them. Returns the dtype to autocast to, None for an fp32
    model."""
    lora.attach(model, config.lora, config.seed)
    for adapter in lora.adapters(model):
        for parameter in (adapter.a, adapter.b):
            parameter.data = parameter.data.float()
    if config.lora.start_from is not None:
        lora.load_adapters(model, config.lora.start_from, trainable(model))
    dtype = resolve_device(config)[1]
    return None if dtype == torch.float32 else dtype


def give_back(model: nn.Module) -> None:
    """Puts transformers' own gated-delta layers back in place of the loop's, which keep documents apart: the same parameters
    and submodules under the same names."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is PackedDeltaNet:
                setattr(parent, name, _original(child))


def _original(child: PackedDeltaNet) -> nn.Module:
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

    layer = Qwen3_5GatedDeltaNet.__new__(Qwen3_5GatedDeltaNet)
    layer.__dict__.update(child.__dict__)  # torch's bookkeeping and plain attributes alike, as the loop took them over
    return layer
