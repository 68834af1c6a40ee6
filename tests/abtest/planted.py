"""Optimizations to judge the judge by: defects modelled on ones that happened, and rewrites that change nothing."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from kernels.contract import Exactness, Optimization
from loop import delta_net
from loop.batch import IGNORE
from loop.delta_net import CHUNK, PackedDeltaNet
from loop.model import cross_entropy_head, plain_micro_step
from loop.optim import MasterAdamW, learning_rate

Apply = Callable[..., None]


def plant(name: str, apply: Apply, claim: Exactness = Exactness.ROUNDING) -> Optimization:
    return Optimization(name, "planted", claim, "planted", lambda run: None, apply)


def swap_modules(old: type, make: Callable[[nn.Module], nn.Module]) -> Apply:
    """Replaces every module of exactly type `old`."""

    def apply(run) -> None:
        for parent in list(run.model.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is old:
                    setattr(parent, name, make(child))

    return apply


# Packing: what one document tells the next.


def stock_layer(child: PackedDeltaNet) -> nn.Module:
    """transformers' own layer back again, which takes boundaries and ignores them."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

    layer = Qwen3_5GatedDeltaNet.__new__(Qwen3_5GatedDeltaNet)
    layer.__dict__.update(child.__dict__)
    return layer


class ConvLeak(PackedDeltaNet):
    def convolve(self, x, pack):
        conv = delta_net._plain("causal_conv1d_fn")
        rows = x.transpose(1, 2)
        return conv(rows, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation=self.activation).transpose(1, 2)


class StateLeak(PackedDeltaNet):
    def delta_rule(self, q, k, v, g, beta, pack):
        copies = self.num_v_heads // self.num_k_heads
        q, k = (x.repeat_interleave(copies, dim=2) for x in (q, k))
        rule = delta_net._plain("torch_chunk_gated_delta_rule")
        return rule(q, k, v, g, beta, chunk_size=CHUNK, use_qk_l2norm_in_kernel=True)[0]


def attention_across_documents(run) -> None:
    from transformers import AttentionInterface

    from loop.attention import attend

    def attend_to_everything(module, query, key, value, attention_mask, **options):
        return attend(module, query, key, value, None, **options)  # no mask: causal over the whole pack

    AttentionInterface.register("leaky", attend_to_everything)
    run.model.set_attn_implementation("leaky")


# Loss and normalisation.


def head(function) -> Apply:
    def apply(run) -> None:
        run.loss_head = function

    return apply


def too_large(model, hidden, batch):
    return 1.01 * cross_entropy_head(model, hidden, batch)


def gradient_too_large(model, hidden, batch):
    loss = cross_entropy_head(model, hidden, batch)
    return loss + 0.01 * (loss - loss.detach())  # the loss is right, what flows back is not


def predicts_across_boundaries(model, hidden, batch):
    labels = batch.labels.flatten().clone()
    ends = batch.cu_seqlens[1:-1].long() - 1
    labels[ends] = batch.input_ids.flatten()[ends + 1]
    logits = model.get_output_embeddings()(hidden).float()
    return F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORE, reduction="sum")


def not_a_number(model, hidden, batch):
    return cross_entropy_head(model, hidden, batch) * torch.nan


def other_order(model, hidden, batch):
    logits = model.get_output_embeddings()(hidden).float()
    losses = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="none")
    return losses.flip(0).view(-1, 16).sum(0).sum()


# The micro-step.


def step(function) -> Apply:
    def apply(run) -> None:
        run.micro_step = function

    return apply


def mean_of_means(run, batch, step_supervised_tokens):
    return plain_micro_step(run, batch, batch.supervised_tokens * run.config.grad_accum)


def stale_batch(run) -> None:
    kept = []

    def micro_step(run, batch, step_supervised_tokens):
        kept.append(batch)
        return plain_micro_step(run, kept[0], step_supervised_tokens)

    run.micro_step = micro_step


def draws_random_numbers(run, batch, step_supervised_tokens):
    torch.rand(1)
    return plain_micro_step(run, batch, step_supervised_tokens)


def fresh_copies(run) -> None:
    """Every MLP swapped for a shallow copy of itself: the same classes, tensors and results."""
    for layer in run.model.model.layers:
        layer.mlp = copy.copy(layer.mlp)


def wrapped_reference(run) -> None:
    run.micro_step = functools.partial(plain_micro_step)


def sum_of_means(run, batch, step_supervised_tokens):
    return plain_micro_step(run, batch, batch.supervised_tokens)


def gradients_in_one_buffer(run, batch, step_supervised_tokens):
    """Two parameters of one shape end up with the same gradient buffer."""
    loss = plain_micro_step(run, batch, step_supervised_tokens)
    one, other = [p for name, p in run.optimizer.parameters.items() if name.endswith("up_proj.lora_A.weight")][:2]
    other.grad = one.grad
    return loss


# Adapters.


class Lora(nn.Module):
    """`product` computes what the adapter adds; the parameters stay where every module expects them."""

    def __init__(self, peft_layer: nn.Module, product: Callable) -> None:
        super().__init__()
        self.base_layer, self.product = peft_layer.base_layer, product
        self.lora_A, self.lora_B = peft_layer.lora_A, peft_layer.lora_B
        self.scaling, self.lora_dropout = peft_layer.scaling, peft_layer.lora_dropout

    def forward(self, x):
        return self.base_layer(x) + self.product(
            x, self.lora_A["default"].weight, self.lora_B["default"].weight, self.scaling["default"]
        )


def adapters(product: Callable, only: str = "") -> Apply:
    def apply(run) -> None:
        for name, module in list(run.model.named_modules()):
            if hasattr(module, "lora_A") and isinstance(module.lora_A, nn.ModuleDict) and name.endswith(only):
                parent, _, attribute = name.rpartition(".")
                setattr(run.model.get_submodule(parent), attribute, Lora(module, product))

    return apply


def rounded_to_bf16(x, a, b, scaling):
    return F.linear(F.linear(x, a), b).bfloat16().float() * scaling


def scaled_by_the_inverse(x, a, b, scaling):
    return F.linear(F.linear(x, a), b) / scaling


def scaled_one_percent_more(x, a, b, scaling):
    return F.linear(F.linear(x, a), b) * (1.01 * scaling)


def rows_and_columns_swapped(x, a, b, scaling):
    """The wrong stride into B, as if it were stored the other way round."""
    return F.linear(F.linear(x, a), b.reshape(b.shape[1], b.shape[0]).T) * scaling


def without_gradient_of_a(x, a, b, scaling):
    return F.linear(F.linear(x, a.detach()), b) * scaling


def with_zero_gradient_of_b(x, a, b, scaling):
    return F.linear(F.linear(x, a), b.detach() + 0 * b) * scaling


def multiplied_out(x, a, b, scaling):
    """The same product, associated the other way: a rewrite that changes rounding alone."""
    return F.linear(x, b @ a) * scaling


# The optimizer.


def optimizer(kind: type) -> Apply:
    def apply(run) -> None:
        old = run.optimizer
        run.optimizer = kind(old.parameters, old.config, old.steps)

    return apply


class NeverUpdates(MasterAdamW):
    def step(self, step):
        self.zero_grad()
        return learning_rate(self.config, step, self.steps), torch.zeros(())


class OneStepAhead(MasterAdamW):
    """The next step's rate, under the name of this one's."""

    def step(self, step):
        _, norm = super().step(step + 1)
        return learning_rate(self.config, step, self.steps), norm


class HalfTheRate(MasterAdamW):
    def step(self, step):
        rate, norm = super().step(step)
        return rate / 2, norm


class WithoutDecay(MasterAdamW):
    def __init__(self, parameters, config, steps):
        super().__init__(parameters, dataclasses.replace(config, weight_decay=0.0), steps)
