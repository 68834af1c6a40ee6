"""Two layers of a hybrid model, one of gated delta rule and one of attention, as the op: what pads or packs is the batch."""

from __future__ import annotations

import torch
from torch import nn

from kernels.contract import Workload
from loop.attention import use_repeatable_attention
from loop.batch import IGNORE, PackedBatch
from loop.delta_net import isolate_documents
from loop.model import hidden_fast_paths
from loop.shapes import SHAPES

VOCABULARY = 512
FEWEST_ROWS = 32  # of a weight that trains here; a layer of the model has 16 heads
KINDS = ["linear_attention", "full_attention"]

_SMALL = {"tiny": 1, "D": 128, "I": 384}
_2B = {"tiny": 0, "D": 2048, "I": 6144}
_CASES: tuple[tuple[Workload, tuple[int, ...]], ...] = (
    (Workload("2B, mean a quarter of longest", _2B | {"T": 2304, "longest": 1024}), (1024, 256, 128, 512, 192, 64, 96, 32)),
    (Workload("2B, all of one length", _2B | {"T": 2048, "longest": 256}), (256,) * 8),
    (Workload("2B, one document", _2B | {"T": 2048, "longest": 2048}), (2048,)),
    (Workload("small, ragged", _SMALL | {"T": 163, "longest": 70}, "float32", small=True), (70, 1, 2, 65, 3, 1, 21)),
    (Workload("small, one document", _SMALL | {"T": 97, "longest": 97}, "float32", small=True), (97,)),
)  # fmt: skip
WORKLOADS = tuple(workload for workload, _ in _CASES)
_LENGTHS = {workload.name: lengths for workload, lengths in _CASES}


def inputs(workload: Workload, device: torch.device, seed: int) -> tuple[nn.Module, PackedBatch]:
    """The layers with random weights, and a pack of random tokens, every position but the last of each document supervised.

    Matrices train, but for those with a row a head: a gradient of a few sums, as a vector's, is rounded by luck.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (workload.shape["T"],), generator=generator)
    return layers(workload, device, seed), pack(ids, _LENGTHS[workload.name]).to(device)


def layers(workload: Workload, device: torch.device, seed: int) -> nn.Module:
    """Two layers and a norm of the shape's sizes, documents kept apart, in training mode, drawn on the CPU. Attention is the
    one that repeats itself, as in every gate: PyTorch's own choice for long rows has other bits at a second call."""
    with hidden_fast_paths():
        from transformers import AutoConfig, AutoModelForCausalLM

        kind, shape = SHAPES["qwen3.5-tiny" if workload.shape["tiny"] else "qwen3.5-2b"]
        sizes = shape | {"num_hidden_layers": len(KINDS), "layer_types": KINDS, "vocab_size": VOCABULARY}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = AutoConfig.for_model(kind, **sizes)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    isolate_documents(model)
    use_repeatable_attention(model)
    model.config.use_cache = False
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim >= 2 and parameter.shape[0] >= FEWEST_ROWS)
    return model.to(device, getattr(torch, workload.dtype)).train()


def pack(ids: torch.Tensor, lengths: tuple[int, ...]) -> PackedBatch:
    """ids [T] in documents of these lengths, T in all, as one row without padding."""
    labels, positions = [], []
    for document in ids.split(lengths):
        labels.append(torch.cat([document[1:], torch.tensor([IGNORE])]))
        positions.append(torch.arange(len(document)))
    bounds = torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)
    joined = torch.cat(labels)
    supervised = int((joined != IGNORE).sum())
    return PackedBatch(ids[None], joined[None], torch.cat(positions)[None], bounds, len(ids), supervised)


def _matrices(workload: Workload) -> int:
    """Weights of the products of both layers."""
    shape = SHAPES["qwen3.5-tiny" if workload.shape["tiny"] else "qwen3.5-2b"][1]
    D, I = workload.shape["D"], workload.shape["I"]
    keys = shape["linear_num_key_heads"] * shape.get("linear_key_head_dim", 128)
    heads = shape.get("linear_num_value_heads", 16)
    values = heads * shape.get("linear_value_head_dim", 128)
    delta = D * (2 * keys + values) + D * values + 2 * D * heads + values * D
    width, kv = (shape[key] * shape["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    attention = 2 * D * width + 2 * D * kv + width * D  # q_proj makes an output gate, too
    return delta + attention + 2 * 3 * D * I


def flops(workload: Workload) -> int:
    """Three products a weight and real token; attention within documents, two products forward and five backward."""
    shape = SHAPES["qwen3.5-tiny" if workload.shape["tiny"] else "qwen3.5-2b"][1]
    scores = sum(length * (length + 1) // 2 for length in _LENGTHS[workload.name])
    width = shape["num_attention_heads"] * shape["head_dim"]
    return 6 * _matrices(workload) * workload.shape["T"] + 7 * 2 * scores * width


def bytes_moved(workload: Workload) -> int:
    """Weights are read forward and backward, and their gradients written; hidden states are read or written once a layer
    and direction."""
    size = getattr(torch, workload.dtype).itemsize
    return (3 * _matrices(workload) + 4 * len(KINDS) * workload.shape["T"] * workload.shape["D"]) * size
