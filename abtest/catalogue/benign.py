"""Honest rewrites of the loss, the micro-step, the linear layers and the adapters: other rounding, the same function.

The gate's limits are calibrated on these and on `benign_layers`: it has to let all of them pass. Each does what a careful
author would: partial sums are kept in fp32 and rounded once, gradients of weights among them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import starmap

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abtest.catalogue.patching import override, parents_of, wide, wrap_micro_step
from abtest.catalogue.planted import BOTH, Planted
from abtest.oracle import unpacked
from kernels.supervised_logits.kernel import LEAST_ROWS, supervised_cross_entropy
from loop.batch import IGNORE, PackedBatch
from loop.lora import Adapter, adapters
from loop.model import cross_entropy_head
from loop.run import LossHead, Run

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def benign(
    name: str,
    summary: str,
    modelled_on: str,
    change: Callable[[Run], None],
    eligible: Callable[[Run], str | None] = lambda run: None,
    methods: tuple[str, ...] = BOTH,
) -> Planted:
    """A rewrite of the whole model: `change(run)` plants it."""
    return Planted(
        name,
        "benign",
        "benign",
        summary,
        modelled_on,
        lambda run, layer, magnitude: change(run),
        layers=("all",),
        methods=methods,
        eligible=eligible,
    )


# The loss head: hidden [B, L, D] -> fp32 sum over supervised positions.


def chunked_head(model: nn.Module, hidden: Tensor, batch: PackedBatch) -> Tensor:
    """Up to four blocks of rows; the weight's gradient is added up over them in fp32."""
    rows, labels = hidden.flatten(0, 1), batch.labels.flatten()
    blocks = min(max(len(rows) // LEAST_ROWS, 1), 4)
    weight = wide(model.get_output_embeddings().weight)
    losses = [
        F.cross_entropy(F.linear(wide(part), weight), own, ignore_index=IGNORE, reduction="sum")
        for part, own in zip(rows.tensor_split(blocks), labels.tensor_split(blocks), strict=True)
    ]
    return torch.stack(losses).sum()


def logsumexp_head(model: nn.Module, hidden: Tensor, batch: PackedBatch) -> Tensor:
    logits = wide(model.get_output_embeddings()(hidden).flatten(0, 1))
    return _log_of_sum_minus_target([logits], batch.labels.flatten())


def vocabulary_blocks_head(model: nn.Module, hidden: Tensor, batch: PackedBatch) -> Tensor:
    """Four blocks of the vocabulary; hidden's gradient is added up over them in fp32."""
    rows, weight = wide(hidden.flatten(0, 1)), wide(model.get_output_embeddings().weight)
    return _log_of_sum_minus_target([F.linear(rows, part) for part in weight.tensor_split(4)], batch.labels.flatten())


def _log_of_sum_minus_target(blocks: list[Tensor], labels: Tensor) -> Tensor:
    """Logits [T, part of the vocabulary], fp32. Relative to the largest, so that nothing cancels at p(target) -> 1."""
    largest = torch.stack([block.detach().amax(-1) for block in blocks]).amax(0)
    shifted = [block - largest[:, None] for block in blocks]
    total = sum(block.flip(-1).exp().sum(-1) for block in shifted)
    target = torch.cat(shifted, -1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return (total.log() - target).masked_fill(labels == IGNORE, 0.0).sum()


def backwards_head(model: nn.Module, hidden: Tensor, batch: PackedBatch) -> Tensor:
    """The reference's losses, added up in blocks of 64 from the last position on."""
    logits = wide(model.get_output_embeddings()(hidden).flatten(0, 1))
    losses = F.cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORE, reduction="none")
    return torch.stack([block.sum() for block in losses.flip(0).split(64)]).sum()


def _head(head: LossHead) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        run.loss_head = head

    return change


def _reference_head(run: Run) -> str | None:
    if run.loss_head is not cross_entropy_head:
        return "another loss head than the reference's is in the run"
    if getattr(run.model.get_output_embeddings(), "bias", None) is not None:
        return "the output projection has a bias"
    return None


# The micro-step.


def _one_length_at_a_time(run: Run) -> None:
    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def micro_step(run: Run, batch: PackedBatch, step_supervised_tokens: int) -> Tensor:
            sums = [original(run, rows.to(run.device), step_supervised_tokens) for rows in unpacked(batch)]
            return torch.stack(sums).sum() if sums else original(run, batch, step_supervised_tokens)

        return micro_step

    wrap_micro_step(run, make)


def _toggle_recomputation(run: Run) -> None:
    if run.model.is_gradient_checkpointing:
        run.model.gradient_checkpointing_disable()
    else:
        run.model.gradient_checkpointing_enable({"use_reentrant": False})


def no_dropout(run: Run) -> str | None:
    """Why a rewrite that calls modules otherwise, or not at all, would draw other masks; None without dropout."""
    attention = getattr(run.model.config, "attention_dropout", 0.0)
    if attention or (run.config.method == "lora" and run.config.lora.dropout):
        return "with dropout it would draw other masks"
    return None


# Linear layers: x [..., in], weight [out, in], bias [out] or None -> [..., out]. The vocabulary's belongs to the loss head.


def row_blocks(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A third of the rows and the rest; the weight's gradient is added up over them in fp32."""
    rows, weight = wide(x).flatten(0, -2), wide(weight)
    bias = None if bias is None else wide(bias)
    parts = rows.tensor_split((len(rows) // 3,)) if len(rows) >= 3 * LEAST_ROWS else (rows,)
    return torch.cat([F.linear(part, weight, bias) for part in parts]).view(*x.shape[:-1], -1).to(x.dtype)


def split_k(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Two halves of the inputs, whose partial sums are added in fp32."""
    out = sum(starmap(F.linear, zip(wide(x).tensor_split(2, -1), wide(weight).tensor_split(2, 1), strict=True)))
    return (out if bias is None else out + wide(bias)).to(x.dtype)


def inputs_reversed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.flip(-1), weight.flip(-1), bias)


def output_blocks(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Two halves of the outputs; the input's gradient is added up over them in fp32."""
    rows, biases = wide(x), (None, None) if bias is None else wide(bias).tensor_split(2)
    halves = zip(wide(weight).tensor_split(2), biases, strict=True)
    return torch.cat([F.linear(rows, half, own) for half, own in halves], -1).to(x.dtype)


def _linears(product: Product) -> Callable[[Run], None]:
    """Every linear layer but the vocabulary's; of an adapter all three, whichever module computes them."""

    def adapted(x: Tensor, adapter: Adapter) -> Tensor:
        inner = product(product(x, adapter.a, None), adapter.b, None)
        return product(x, adapter.base.weight, adapter.base.bias) + inner * adapter.scaling

    def change(run: Run) -> None:
        head, within = run.model.get_output_embeddings(), tuple(f"{adapter.name}." for adapter in adapters(run.model))
        for name, layer in list(run.model.named_modules()):
            if isinstance(layer, nn.Linear) and layer is not head and not name.startswith(within):
                override(run.model, name, "forward", lambda _, layer=layer: lambda x: product(x, layer.weight, layer.bias))
        _adapters(adapted)(run)

    return change


# Adapters.


def multiplied_out(x: Tensor, adapter: Adapter) -> Tensor:
    """x (B A)^T instead of (x A^T) B^T."""
    return F.linear(x, adapter.base.weight, adapter.base.bias) + F.linear(x, adapter.b @ adapter.a) * adapter.scaling


def one_product(x: Tensor, adapter: Adapter) -> Tensor:
    """[x, scaling x A^T] [W, B]^T: what the adapter adds is summed up with the rest, and rounded with it."""
    inner = (F.linear(wide(x), wide(adapter.a)) * adapter.scaling).to(x.dtype)
    return F.linear(torch.cat([x, inner], -1), torch.cat([adapter.base.weight, adapter.b], 1), adapter.base.bias)


def _adapters(product: Callable[[Tensor, Adapter], Tensor]) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        for adapter in list(adapters(run.model)):
            override(run.model, adapter.name, "forward", lambda _, adapter=adapter: lambda x: product(x, adapter))

    return change


# Projections of one input as one product.


class Joint:
    """Linear layers, with or without an adapter, as one product: the first that is called with an input computes all.

    Which results are still to be fetched is remembered for the very tensor they belong to, so that a forward that is run
    again, or stops half-way, finds nothing of another.
    """

    def __init__(self, parts: list[nn.Linear | Adapter]) -> None:
        self.parts = parts
        self.x: Tensor | None = None
        self.left: dict[int, Tensor] = {}

    def __call__(self, index: int, x: Tensor) -> Tensor:
        if self.x is not x or index not in self.left:
            self.x, self.left = x, dict(enumerate(self.product(x)))
        out = self.left.pop(index)
        if not self.left:
            self.x = None
        return out

    def product(self, x: Tensor) -> list[Tensor]:
        bases = [part.base if isinstance(part, Adapter) else part for part in self.parts]
        biases = [base.weight.new_zeros(base.out_features) if base.bias is None else base.bias for base in bases]
        bias = None if all(base.bias is None for base in bases) else torch.cat(biases)
        out = F.linear(x, torch.cat([base.weight for base in bases]), bias)
        outs = [part.contiguous() for part in out.split([base.out_features for base in bases], -1)]
        adapted = {index: part for index, part in enumerate(self.parts) if isinstance(part, Adapter)}
        if adapted:
            inner = F.linear(x, torch.cat([adapter.a for adapter in adapted.values()]))
            inners = inner.split([len(adapter.a) for adapter in adapted.values()], -1)
            for (index, adapter), own in zip(adapted.items(), inners, strict=True):
                outs[index] = outs[index] + F.linear(own, adapter.b) * adapter.scaling
        return outs


def _joint(*children: str) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        by_name = {adapter.name: adapter for adapter in adapters(run.model)}
        for parent in parents_of(run.model, *children):
            names = [f"{parent}.{child}" for child in children]
            joint = Joint([by_name.get(name) or run.model.get_submodule(name) for name in names])
            for index, name in enumerate(names):
                override(run.model, name, "forward", lambda _, i=index, joint=joint: lambda x: joint(i, x))

    return change


def _has(*children: str) -> Callable[[Run], str | None]:
    def eligible(run: Run) -> str | None:
        if not parents_of(run.model, *children):
            return f"no module of the model has {', '.join(children)}"
        return no_dropout(run)

    return eligible


QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
DELTA = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
PLANTED: tuple[Planted, ...] = (
    benign("loss_in_row_blocks", "the vocabulary's product and the loss by blocks of rows; the head's gradient in fp32",
           "Liger's fused linear cross-entropy, torchtune's chunked loss", _head(chunked_head), _reference_head),
    benign("loss_of_supervised_rows", "the vocabulary's product over supervised rows alone: other blocking of its sums",
           "this project's supervised_logits; Unsloth's and Cut Cross-Entropy's filtered rows",
           _head(supervised_cross_entropy), _reference_head),
    benign("loss_by_logsumexp", "the vocabulary's sum of exponentials in another order, then log minus the target's logit",
           "Unsloth's cross-entropy", _head(logsumexp_head), _reference_head),
    benign("loss_in_vocabulary_blocks", "sums of exponentials and of hidden's gradient by blocks of the vocabulary, in fp32",
           "Cut Cross-Entropy, vocabulary-parallel loss (Megatron)", _head(vocabulary_blocks_head), _reference_head),
    benign("loss_summed_backwards", "the sum of the positions' losses, in blocks from the last on",
           "loss kernels that write one loss a row (Liger, FLA)", _head(backwards_head), _reference_head),
    benign("documents_unpacked", "every gradient is summed over documents of one length at a time: padded rows, not packs",
           "padded batches, Hugging Face's default collator", _one_length_at_a_time, no_dropout),
    benign("recomputation", "none: layers run again in the backward pass, or no longer",
           "gradient checkpointing", _toggle_recomputation),
    benign("linear_in_row_blocks", "weight gradients of linear layers as two partial sums over rows, added in fp32",
           "split-K weight gradients of cuBLAS and Triton", _linears(row_blocks), no_dropout),
    benign("linear_split_k", "outputs of linear layers as two partial sums over inputs, added in fp32",
           "split-K and stream-K products", _linears(split_k), no_dropout),
    benign("linear_inputs_reversed", "outputs of linear layers summed over inputs from the last to the first",
           "a kernel that walks K the other way, channel reordering", _linears(inputs_reversed), no_dropout),
    benign("linear_in_output_blocks", "input gradients of linear layers as two partial sums over outputs, added in fp32",
           "column-parallel layers (Megatron)", _linears(output_blocks), no_dropout),
    benign("lora_multiplied_out", "x (B A)^T: the adapter's two products associated the other way",
           "merged adapters, DoRA's B A", _adapters(multiplied_out), no_dropout, ("lora",)),
    benign("lora_one_product", "base and adapter summed in one product over the concatenated inputs, rounded once",
           "fused LoRA kernels (Unsloth, LoRAFusion)", _adapters(one_product), no_dropout, ("lora",)),
    benign("joint_qkv", "the input's gradient summed over q, k and v in one product", "QKV fusion (Megatron, vLLM)",
           _joint(*QKV), _has(*QKV)),
    benign("joint_gate_up", "the input's gradient summed over gate and up in one product", "gate_up_proj (vLLM, Phi-3)",
           _joint(*GATE_UP), _has(*GATE_UP)),
    benign("joint_delta_inputs", "the input's gradient summed over qkv, z, b and a in one product",
           "in_proj_qkvz and in_proj_ba (Qwen3-Next, vLLM)", _joint(*DELTA), _has(*DELTA)),
)  # fmt: skip
