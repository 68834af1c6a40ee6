"""Packs joined into one: the same documents, the same gradients, a longer row."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from abtest.probes import tricky_batch
from loop.config import Config, DataConfig
from loop.model import plain_micro_step
from loop.rows import padded_micro_step
from loop.training import build, train
from negative_results.packing_above_mean import OPTIMIZATION, patch
from negative_results.packing_above_mean.kernel import joined, joined_micro_step


def test_the_row_is_as_long_as_all_packs():
    batch = tricky_batch(128, 3, 300, seed=1)
    one = joined([batch])
    assert one.input_ids.shape == (1, 384) and one.lengths == batch.lengths
    assert torch.equal(one.cu_seqlens, batch.cu_seqlens) and torch.equal(one.labels.flatten(), batch.labels.flatten())


@pytest.mark.parametrize("model", ["qwen3.5-shallow-tiny", "mistral-tiny"])
def test_joined_packs_teach_what_rows_teach(model, tmp_path):
    data = DataConfig(pack_length=192, packs_per_micro_step=2, cache_dir=tmp_path, max_examples=40)
    run, _ = build(Config(model=model, method="full", device="cpu", dtype="float32", data=data))
    batch = tricky_batch(192, 2, run.model.config.vocab_size, seed=3)
    found = []
    for micro_step in (plain_micro_step, joined_micro_step):
        loss = float(micro_step(run, batch, batch.supervised_tokens))
        found.append((loss, {name: g.clone() for name, g in run.optimizer.gradients().items()}))
        run.optimizer.zero_grad()
    (loss, rows), (other, one) = found
    assert other == pytest.approx(loss, rel=1e-6)
    assert all(torch.allclose(one[name], g, rtol=1e-3, atol=1e-6) for name, g in rows.items())


def test_it_runs_as_an_arm_does(tmp_path):
    data = DataConfig(pack_length=192, packs_per_micro_step=2, cache_dir=tmp_path, max_examples=40)
    config = Config(model="qwen3-tiny", device="cpu", dtype="float32", steps=2, data=data)
    plain, on = train(config), train(config, ["packing_above_mean"])
    assert on.enabled == ("packing_above_mean",) and on.losses == pytest.approx(plain.losses, rel=1e-5)
    alone = replace(config, data=replace(data, packs_per_micro_step=1))
    assert "nothing to join" in train(alone, ["packing_above_mean"]).refused["packing_above_mean"]


def test_it_has_its_reasons_in_words():
    data = SimpleNamespace(data=DataConfig(packs_per_micro_step=2))
    assert "already owns the micro-step" in patch.eligible(SimpleNamespace(config=data, micro_step=padded_micro_step))
    run = SimpleNamespace(config=data, micro_step=plain_micro_step)
    assert OPTIMIZATION.eligible(run) is None
    OPTIMIZATION.apply(run)
    assert run.micro_step is joined_micro_step
