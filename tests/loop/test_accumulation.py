"""A step over several micro-steps is one step over all their supervised tokens."""

from __future__ import annotations

import pytest
import torch
from loop_truth import stir_adapters, worst_error

from loop.config import Config
from loop.training import accumulate, build, train


def gradients_of_a_step(config: Config, step: int = 0) -> tuple[list[float], dict[str, torch.Tensor], list[int]]:
    """Loss sums and accumulated gradients of one step, and the supervised tokens of its micro-steps."""
    run, dataset = build(config)
    if config.method == "lora":
        stir_adapters(run)
    batches = dataset.micro_batches(step, config.grad_accum, config.data.packs_per_micro_step)
    counts = [batch.supervised_tokens for batch in batches]
    sums = accumulate(run, batches, sum(counts))
    return sums, dict(run.optimizer.gradients()), counts


def mean_of_means(config: Config) -> dict[str, torch.Tensor]:
    """What a loop that divides each micro-step by its own tokens would have."""
    run, dataset = build(config)
    stir_adapters(run)
    batches = dataset.micro_batches(0, config.grad_accum, config.data.packs_per_micro_step)
    for batch in batches:
        run.micro_step(run, batch, batch.supervised_tokens * len(batches))
    return dict(run.optimizer.gradients())


@pytest.mark.parametrize("model", ["qwen3.5-shallow-tiny", "qwen3-tiny"])
def test_four_micro_steps_are_one_of_four_packs(make, model):
    apart = make(model=model, grad_accum=4)
    together = make(model=model, data={"packs_per_micro_step": 4})
    sums, gradients, counts = gradients_of_a_step(apart)
    one_sum, one_gradient, one_count = gradients_of_a_step(together)
    assert len(counts) == 4 and sum(counts) == one_count[0]
    assert max(counts) > 1.3 * min(counts), "evenly supervised packs would prove nothing"
    assert sum(sums) == pytest.approx(one_sum[0], rel=1e-6)
    error, name = worst_error(gradients, one_gradient)
    assert error < 1e-5, name
    assert worst_error(mean_of_means(apart), one_gradient)[0] > 1e-2


def test_the_logged_loss_is_over_all_supervised_tokens(make):
    apart = train(make(steps=2, grad_accum=4))
    together = train(make(steps=2, data={"packs_per_micro_step": 4}))
    assert apart.losses == pytest.approx(together.losses, rel=1e-5)
    assert [s.grad_norm for s in apart.steps] == pytest.approx([s.grad_norm for s in together.steps], rel=1e-4)
    assert [s.supervised_tokens for s in apart.steps] == [s.supervised_tokens for s in together.steps]


def test_recomputed_activations_change_no_bit(make):
    """Dropout too: recomputation draws the same masks."""
    lora = {"dropout": 0.2}
    kept = train(make(model="qwen3.5-shallow-tiny", steps=2, lora=lora))
    recomputed = train(make(model="qwen3.5-shallow-tiny", steps=2, lora=lora, gradient_checkpointing=True))
    assert kept.losses == recomputed.losses
    assert kept.losses != train(make(model="qwen3.5-shallow-tiny", steps=2)).losses


def test_bf16_accumulates_over_micro_steps_in_fp32(make):
    """Tensor by tensor, the sum of four bf16 micro-steps equals the fp32 sum of the same four taken one at a time."""
    config = make(method="full", dtype="bfloat16", grad_accum=4)
    _, total, _ = gradients_of_a_step(config)
    run, dataset = build(config)
    batches = dataset.micro_batches(0, 4, 1)
    supervised = sum(batch.supervised_tokens for batch in batches)
    parts = []
    for batch in batches:
        run.micro_step(run, batch, supervised)
        parts.append(dict(run.optimizer.gradients()))
        run.optimizer.zero_grad()
    for name, value in total.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, ((parts[0][name] + parts[1][name]) + parts[2][name]) + parts[3][name]), name
