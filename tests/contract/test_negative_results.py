"""Negative results: each computes what it says it does, and where it is wrong the op check catches it, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from negative import DEVICE, drawn, outcome, run_of, swapped_alike
from torch import nn

from abtest.opcheck import check_op, small_workloads
from abtest.verdict import Level, Verdict
from bench.plan import combination, plan_arms
from bench.records import Perf, Record
from bench.report.shipping import decide
from kernels import registry
from kernels.contract import Fails
from kernels.static_lora.kernel import StaticLora
from loop import lora
from loop.batch import IGNORE
from loop.config import Config
from negative_results import (
    bf16_head_gradient,
    contiguous_linear_patch,
    filtered_cross_entropy,
    merged_lora,
)
from negative_results.bf16_head_gradient.kernel import loss_and_d_logits, rows_a_chunk
from negative_results.contiguous_linear_patch.kernel import ContiguousLinear
from negative_results.filtered_cross_entropy import kernel as filtering
from negative_results.merged_lora.kernel import MergedLora, merge_

ROOT = Path(__file__).resolve().parents[2]
NEGATIVE = {name: one for name, one in registry.discover().items() if registry.is_negative(name)}
ANSWERS = ("**Hypothesis.** ", "**What was tried.** ", "**Measured.** ", "**Reason.** ", "**When to try again.** ")


def wrong_quantities(optimization, dtype: str) -> list[set[str]]:
    """Outputs and gradients beyond their limits, for every small workload of a dtype with two seeds."""
    found = []
    for workload in small_workloads(optimization.op):
        if workload.dtype == dtype:
            for seed in (0, 1):
                report = check_op(optimization.op, workload, DEVICE, seed, optimization.exactness)
                assert report.verdict.level in (Level.BITWISE, Level.ROUNDING, Level.FAILED), report.verdict.reason
                found.append({q.name for q in report.quantities if not q.within_limits})
    assert found
    return found


# All of them


@pytest.mark.parametrize("name", NEGATIVE)
def test_the_page_says_what_was_hoped_for_and_why_it_failed(name):
    text = (ROOT / "negative_results" / name / "README.md").read_text(encoding="utf-8")
    assert [answer for answer in ANSWERS if text.count(answer) != 1] == []


def test_only_a_negative_result_may_say_where_it_fails(monkeypatch):
    from kernels import silu_mul as positive

    monkeypatch.setattr(positive, "OPTIMIZATION", replace(positive.OPTIMIZATION, fails=Fails(op=("float32",))))
    with pytest.raises(ValueError, match=r"silu_mul.*belongs in negative_results/"):
        registry.discover()
    assert not registry.is_negative("silu_mul") and registry.is_negative("merged_lora")


@pytest.mark.parametrize("name", NEGATIVE)
def test_conflicts_name_what_exists(name):
    assert set(NEGATIVE[name].conflicts) <= registry.discover().keys() - {name}
    assert set(NEGATIVE[name].fails.arm) | set(NEGATIVE[name].fails.op) <= {"bfloat16", "float32"}


def test_a_negative_result_that_wins_is_not_shipped():
    plans = plan_arms(("merged_lora", "silu_mul"), Config(), torch.device("cpu"))
    assert [plan.role for plan in plans] == ["negative", "optimization"]
    perf = Perf(1.0, 1.0, 1.0, 1.0, 9.0, 8.9, 9.1, 24)

    def record(arm: str, role: str, perf: Perf | None) -> Record:
        words = {"summary": "", "exactness": "rounding", "why_exact": "", "command": "", "finished_at": "", "run_id": "r"}
        on = () if role == "reference" else (arm,)
        return Record(arm=arm, role=role, optimizations=on, verdict=Verdict(Level.ROUNDING, ""), environment={}, recipe={},
                      data={}, perf=perf, **words)  # fmt: skip

    slower = replace(perf, ratio=1.2, ratio_low=1.1, ratio_high=1.3)
    records = [
        record("stock", "reference", None),
        record("merged_lora", "negative", perf),
        record("silu_mul", "optimization", slower),
    ]
    shipping = decide(records)
    assert shipping.enable == ("silu_mul",)
    assert "negative result" in shipping.not_enabled["merged_lora"]
    assert decide(records[:2]).enable == ()
    assert combination({}, Config()) is None


# merged_lora


def test_a_merge_below_half_an_ulp_leaves_nothing_in_bf16():
    weight = torch.ones(8, 16, dtype=torch.bfloat16, device=DEVICE)
    a, b = torch.ones(1, 16, device=DEVICE).bfloat16(), torch.full((8, 1), 2.0**-10, device=DEVICE).bfloat16()
    zero_a, zero_b = torch.zeros_like(a), torch.zeros_like(b)
    for _ in range(100):  # in sum 0.1, each 2^-10, and 1 + 2^-9 would still round to 1
        merge_(weight, a, b, zero_a, zero_b, 1.0)
    assert torch.equal(weight, torch.ones_like(weight))
    merge_(weight, a, 100 * b, zero_a, zero_b, 1.0)
    assert torch.allclose(weight.float(), torch.tensor(1.1, device=DEVICE), atol=2.0**-7)


def test_the_op_check_catches_the_merged_sum_and_nothing_else():
    for wrong in (
        *wrong_quantities(merged_lora.OPTIMIZATION, "bfloat16"),
        *wrong_quantities(merged_lora.OPTIMIZATION, "float32"),
    ):
        assert wrong and wrong <= {"output 0", "d x"}


def test_merged_layers_follow_their_adapters():
    run = run_of(adapters=True)
    pristine = {adapter.name: adapter.base.weight.clone() for adapter in lora.adapters(run.model)}
    swapped_alike(merged_lora.OPTIMIZATION, run, MergedLora, 14)
    with torch.no_grad():
        for adapter in lora.adapters(run.model):
            adapter.b.normal_(std=0.1)
    merged = outcome(run.model)
    for adapter in lora.adapters(run.model):
        want = pristine[adapter.name] + adapter.scaling * adapter.b @ adapter.a
        torch.testing.assert_close(adapter.base.weight, want)
        adapter.base.weight.data = pristine[adapter.name]
        parent, _, attribute = adapter.name.rpartition(".")
        setattr(
            run.model.get_submodule(parent), attribute, StaticLora(adapter.base, adapter.a, adapter.b, adapter.scaling, 0.0)
        )
    for one, other in zip(outcome(run.model), merged, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_merging_has_its_reasons_in_words():
    assert merged_lora.OPTIMIZATION.eligible(run_of()) == "the run has no PEFT LoRA layers"
    assert "drops out 0.1" in merged_lora.OPTIMIZATION.eligible(run_of(adapters=True, dropout=0.1))
    run = run_of(adapters=True)
    next(lora.adapters(run.model)).base.weight.requires_grad_(True)
    assert "trains its base" in merged_lora.OPTIMIZATION.eligible(run)


# bf16_head_gradient and filtered_cross_entropy


def test_chunks_follow_the_vocabulary():
    assert rows_a_chunk(5376, 2048, 248_320) == 64
    assert rows_a_chunk(5376, 2048, 2048) == 8192
    assert rows_a_chunk(7, 64, 4096) == 16


def test_softmax_minus_onehot():
    logits, labels = drawn(6, 11, scale=3.0), torch.tensor([0, 10, IGNORE, 3, 3, IGNORE], device=DEVICE)
    losses, d = loss_and_d_logits(logits.detach(), labels)
    want = nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(losses, want)
    torch.testing.assert_close(d, torch.autograd.grad(want.sum(), logits)[0])


def test_the_op_check_catches_the_bf16_sum_in_the_weight_gradient_alone():
    head = bf16_head_gradient.OPTIMIZATION
    assert all(wrong == {"d model.lm_head.weight"} for wrong in wrong_quantities(head, "bfloat16"))
    assert all(not wrong for wrong in wrong_quantities(head, "float32"))


def test_the_op_check_catches_the_filter_in_gradients_alone():
    for dtype in filtered_cross_entropy.OPTIMIZATION.fails.op:
        for wrong in wrong_quantities(filtered_cross_entropy.OPTIMIZATION, dtype):
            assert "d hidden" in wrong and "output 0" not in wrong


def test_without_its_filter_the_filtered_head_is_right(monkeypatch):
    monkeypatch.setattr(filtering, "THRESHOLD", 0.0)
    monkeypatch.setattr(filtering, "CHUNK", 50)
    for dtype in ("float32", "bfloat16"):
        assert all(not wrong for wrong in wrong_quantities(filtered_cross_entropy.OPTIMIZATION, dtype))


def test_a_tile_is_dropped_where_all_of_it_is_small():
    low, high = filtering.THRESHOLD / 2, -filtering.THRESHOLD
    d = torch.tensor([[high, low, low, low, low], [low, low, low, low, high], [low, low, low, low, low]], device=DEVICE)
    kept = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]], device=DEVICE)
    assert torch.equal(filtering.filter_(d.clone()), d * kept)
    kept = torch.tensor([[1, 1, 0, 0, 1], [1, 1, 0, 0, 1], [0, 0, 0, 0, 0]], device=DEVICE)
    assert torch.equal(filtering.filter_(d.clone(), tile=2), d * kept)


def test_heads_have_their_reasons_in_words():
    both = (bf16_head_gradient.OPTIMIZATION, filtered_cross_entropy.OPTIMIZATION)
    run = run_of(adapters=True)
    assert "the head is frozen" in both[0].eligible(run) and both[1].eligible(run) is None
    taken = SimpleNamespace(model=run.model, loss_head=print)
    assert {one.eligible(taken) for one in both} == {"another optimization already owns the loss head"}
    run.model.lm_head = nn.Linear(32, 64)
    assert all("plain nn.Linear without a bias" in one.eligible(run) for one in both)
    run = run_of()
    run.model.config.logit_scale = 0.5
    assert all("logit_scale" in one.eligible(run) for one in both)


@pytest.mark.parametrize(
    "optimization", [bf16_head_gradient.OPTIMIZATION, filtered_cross_entropy.OPTIMIZATION], ids=lambda o: o.name
)
def test_applied_a_head_is_the_run_s(optimization):
    run = run_of()
    optimization.apply(run)
    assert run.loss_head is optimization.op.candidate


# contiguous_linear_patch


def test_every_linear_layer_is_swapped():
    swapped_alike(contiguous_linear_patch.OPTIMIZATION, run_of(), ContiguousLinear, 15)
    swapped_alike(contiguous_linear_patch.OPTIMIZATION, run_of(adapters=True), ContiguousLinear, 43)
    alone = SimpleNamespace(model=nn.Sequential(nn.ReLU()))
    assert contiguous_linear_patch.OPTIMIZATION.eligible(alone) == "Sequential has no plain nn.Linear"


def test_the_weight_is_copied_at_every_call():
    layer, x = ContiguousLinear(nn.Linear(8, 4, device=DEVICE)), drawn(2, 3, 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x), layer(x)
    copies = [tensor for tensor in kept if tensor.shape == (8, 4) and tensor.is_contiguous()]
    assert len(copies) == 2 and len({tensor.data_ptr() for tensor in (*copies, layer.weight)}) == 3


def test_negative_results_are_arms_by_name_or_as_a_group_of_their_own():
    def names(*asked: str) -> set[str]:
        return {plan.name for plan in plan_arms(asked, Config(), torch.device("cpu")) if plan.role != "peer"}

    negative = {name for name in registry.discover() if registry.is_negative(name)}
    assert names("negative") == negative and len(negative) >= 8
    assert names("all") == registry.discover().keys() - negative
    assert names("all", "negative") == registry.discover().keys()
