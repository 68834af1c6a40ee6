"""A pack gives the losses and gradients of its documents run alone, and no document sees another."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from loop_truth import TINY, packed_step, spans, stir_adapters, unpacked_step, worst_error

from abtest.probes import tricky_batch
from loop.batch import PackedBatch
from loop.model import forward_body
from loop.run import Run
from loop.training import build

LENGTH = 384  # long enough for a document of 128, which mistral-tiny's window of 96 does not cover
TOLERANCE = 1e-4  # of fp32 against fp64; measured: at most 3e-5, and 0.1 or more for every planted leak


def tricky(run: Run, length: int = LENGTH) -> PackedBatch:
    return tricky_batch(length, 2, run.model.config.vocab_size, seed=3)


def built(make, model: str, method: str = "lora", **changes) -> Run:
    run, _ = build(make(model=model, method=method, data={"packs_per_micro_step": 2}, **changes))
    if method == "lora":
        stir_adapters(run)
    return run


def leak_delta_rule(run: Run) -> None:
    """Puts transformers' own gated-delta layers back; they ignore boundaries."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

    for layer in run.model.get_decoder().layers:
        if hasattr(layer, "linear_attn"):
            original = Qwen3_5GatedDeltaNet(run.model.config, layer.linear_attn.layer_idx)
            original.__dict__.update(layer.linear_attn.__dict__)
            layer.linear_attn = original


def without_restarts(batch: PackedBatch) -> PackedBatch:
    """The same documents with positions that count through the row, so that attention sees one document."""
    positions = torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)
    return dataclasses.replace(batch, position_ids=positions)


def hidden(run: Run, batch: PackedBatch) -> torch.Tensor:
    with torch.no_grad():
        return forward_body(run.model, batch).flatten(0, 1)


def leaks(run: Run, batch: PackedBatch) -> list[tuple[int, int]]:
    """(edited document, document whose hidden states changed with it); an edit that changes nothing is (i, -1)."""
    before, found = hidden(run, batch), []
    for edited, (start, end) in enumerate(spans(batch)):
        ids = batch.input_ids.clone()
        ids.view(-1)[start:end] = (ids.view(-1)[start:end] + 1) % run.model.config.vocab_size
        same = (hidden(run, dataclasses.replace(batch, input_ids=ids)) == before).all(-1)
        if bool(same[start:end].all()):
            found.append((edited, -1))
        found += [(edited, other) for other, (a, b) in enumerate(spans(batch)) if other != edited and not same[a:b].all()]
    return found


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("model", TINY)
def test_losses_and_gradients_are_those_of_documents_run_alone(make, model, method):
    run = built(make, model, method)
    batch = tricky(run)
    assert len(batch.lengths) > 20 and max(batch.lengths) == 128
    loss, gradients = packed_step(run, batch)
    true_loss, truth = unpacked_step(run, batch, torch.float64)
    assert loss == pytest.approx(true_loss, rel=1e-6)
    assert gradients.keys() == truth.keys()
    assert all(float(g.norm()) > 0 for g in truth.values())
    error, name = worst_error(gradients, truth)
    assert error < TOLERANCE, name


@pytest.mark.parametrize("model", TINY)
def test_editing_a_document_changes_no_bit_of_another(make, model):
    run = built(make, model)
    assert leaks(run, tricky(run, 256)) == []


@pytest.mark.parametrize("model", ["qwen3.5-shallow-tiny", "mistral-tiny"])
def test_attention_that_repeats_itself_is_the_same_attention(make, model):
    plain, repeatable = built(make, model), built(make, model, repeatable_attention=True)
    assert plain.model.config._attn_implementation != repeatable.model.config._attn_implementation
    batch = tricky(plain)
    (loss, gradients), (other_loss, other) = packed_step(plain, batch), packed_step(repeatable, batch)
    assert loss == other_loss and all(torch.equal(other[name], value) for name, value in gradients.items())
    assert leaks(repeatable, tricky(repeatable, 256)) == []


def test_a_delta_rule_that_ignores_boundaries_is_seen(make):
    run = built(make, "qwen3.5-shallow-tiny")
    batch = tricky(run, 256)
    leak_delta_rule(run)
    found = leaks(run, batch)
    assert (0, 1) in found and all(other > edited for edited, other in found), "the state flows forward only"
    true_loss, truth = unpacked_step(run, batch, torch.float64)
    loss, gradients = packed_step(run, batch)
    assert loss != pytest.approx(true_loss, rel=1e-5)
    assert worst_error(gradients, truth)[0] > 100 * TOLERANCE


@pytest.mark.parametrize("model", TINY)
def test_attention_that_ignores_boundaries_is_seen(make, model):
    run = built(make, model)
    batch = without_restarts(tricky(run, 256))
    assert leaks(run, batch)
    true_loss, truth = unpacked_step(run, batch, torch.float64)
    loss, gradients = packed_step(run, batch)
    assert loss != pytest.approx(true_loss, rel=1e-5)
    assert worst_error(gradients, truth)[0] > 100 * TOLERANCE


def test_a_window_that_is_ignored_is_seen(make):
    run = built(make, "mistral-tiny")
    batch = tricky(run)
    true_loss, _ = unpacked_step(run, batch, torch.float64)
    run.model.config.sliding_window = LENGTH
    assert packed_step(run, batch)[0] != pytest.approx(true_loss, rel=1e-6)


def test_real_packs_with_padding_too(make):
    run, dataset = build(make(model="qwen3.5-shallow-tiny", data={"packs_per_micro_step": 2}))
    stir_adapters(run)
    batch = dataset.batch([0, len(dataset.packs) - 1])
    assert batch.real_tokens < batch.positions
    error, name = worst_error(packed_step(run, batch)[1], unpacked_step(run, batch, torch.float64)[1])
    assert error < TOLERANCE, name
