"""cuda_graphs: one graph serves packs of other documents."""

from __future__ import annotations

import pytest
import torch
from graphed import LENGTH, made, outcome, pack, same
from hypothesis import given, settings
from hypothesis import strategies as st

from abtest.probes import one_document, tricky_batch
from kernels.cuda_graphs import inputs as static
from kernels.cuda_graphs.inputs import CHUNKS, GROUPS, ROWS, chunk_count, chunk_indices, padded_rows, row_count, signature
from kernels.cuda_graphs.micro_step import CAPTURES, REPLAYS
from kernels.packed_attention import kernel as packed_attention
from kernels.packed_attention import patch as packed_attention_patch
from kernels.supervised_logits.kernel import supervised_cross_entropy
from kernels.supervised_mlp import patch as supervised_mlp_patch
from loop.batch import IGNORE
from loop.delta_net import CHUNK, Pack, PackedDeltaNet
from loop.model import plain_micro_step
from loop.run import Run

pytestmark = pytest.mark.usefixtures("taped")


def test_stock_attention_needs_one_graph_for_all_packs():
    run, plain = (made(graphed=graphed)[0] for graphed in (True, False))
    for seed, lengths in enumerate(((5, 60), (100,), (1, 2, 3, 4, 5), (64, 64))):
        batch = pack(run, seed, lengths=lengths)
        assert same(outcome(run, batch), outcome(plain, batch))
    assert run.micro_step.counts == {REPLAYS: 4, CAPTURES: 1}


def test_documents_as_rows_need_a_graph_for_each_set_of_lengths():
    run, plain = (made("qwen3.5-shallow-tiny", graphed=graphed)[0] for graphed in (True, False))
    for seed, lengths in enumerate(((70, 10), (10, 70), (60, 10), (65, 64), (9, 100))):
        batch = pack(run, seed, lengths=lengths)  # what is left of the pack is a document, too
        assert same(outcome(run, batch), outcome(plain, batch)), lengths
    assert run.micro_step.asked == {GROUPS}
    assert run.micro_step.counts == {REPLAYS: 5, CAPTURES: 2}  # (2 chunks, 1, 2) and (1, 1, 2); others repeat them


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels on a CPU need Triton's interpreter")
def test_attention_over_the_flat_pack_needs_one_graph_for_all_packs(monkeypatch):
    """In half precision on a GPU: here its kernels are interpreted, in fp32, in one layer."""
    monkeypatch.setattr(packed_attention, "fused", lambda query: True)
    run, plain = (made(graphed=graphed)[0] for graphed in (True, False))
    for own in (run, plain):
        own.model.model.layers = own.model.model.layers[:1]
        packed_attention_patch.apply(own)
    for seed, lengths in enumerate(((5, 60), (100,), (1, 2, 3, 4, 5))):
        batch = pack(run, seed, lengths=lengths)
        assert same(outcome(run, batch), outcome(plain, batch)), lengths
    assert run.micro_step.asked == set()
    assert run.micro_step.counts == {REPLAYS: 3, CAPTURES: 1}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=9), st.lists(st.integers(1, 60), max_size=9), st.integers(1, 3))
def test_a_graph_s_positions_know_where_their_documents_begin_and_end(lengths, others, rows):
    """Documents go on until a row is full; what is left of it is one, too."""
    first, second = (tricky_batch(LENGTH, rows, 99, 3, tuple(own) or (LENGTH,)).to("cpu") for own in (lengths, others))
    inputs = static.Inputs(first)
    for batch in (first, second):
        inputs.fill(batch, 1)
        pack, own = inputs.pack(), Pack.of(batch)
        for found, wanted in ((pack.starts, own.starts), (pack.ends, own.ends)):
            assert torch.equal(found, wanted) and found.dtype == wanted.dtype == torch.int32
        assert pack.ends is pack.ends and pack.starts is pack.starts  # once a micro-step, not once a layer
    assert inputs.asked == set()


class ChunkedNet(PackedDeltaNet):
    """A delta layer that computes as FLA's kernels do: a program a chunk, masked where its document ends."""

    def convolve(self, x: torch.Tensor, pack: Pack) -> torch.Tensor:
        return x

    def delta_rule(self, q, k, v, g, beta, pack: Pack) -> torch.Tensor:
        document, place = pack.chunk_indices.long().unbind(1)
        bounds = pack.cu_seqlens.long()
        offsets = place[:, None] * CHUNK + torch.arange(CHUNK)
        inside = offsets < (bounds[document + 1] - bounds[document])[:, None]  # [chunks, 64]
        at = (bounds[document][:, None] + offsets).clamp(max=v.shape[1] - 1)
        rows = v[0][at] * inside[:, :, None, None]
        sums = rows.cumsum(1) * inside[:, :, None, None]
        return torch.zeros_like(v[0]).index_add(0, at.flatten(), sums.flatten(0, 1))[None]


def chunked(graphed: bool) -> Run:
    run, _ = made("qwen3.5-shallow-tiny", graphed=graphed)
    for module in run.model.modules():
        if type(module) is PackedDeltaNet:
            module.__class__ = ChunkedNet
    return run


def test_kernels_that_go_by_chunks_share_graphs_that_have_more_of_them():
    run, plain = chunked(True), chunked(False)
    for seed, lengths in enumerate(((70, 10), (64, 64), (1, 2, 3, 4), (5,) * 5, (5,) * 6, (100, 1))):
        batch = pack(run, seed, lengths=lengths)
        assert same(outcome(run, batch), outcome(plain, batch)), lengths
    assert run.micro_step.asked == {CHUNKS}
    assert run.micro_step.counts == {REPLAYS: 6, CAPTURES: 3}  # of up to 4, 8 and 12 chunks


class StartsNet(PackedDeltaNet):
    """A delta layer that computes as `conv_silu_norm` does: by where each position's document begins."""

    def convolve(self, x: torch.Tensor, pack: Pack) -> torch.Tensor:
        return x

    def delta_rule(self, q, k, v, g, beta, pack: Pack) -> torch.Tensor:
        return v - v.index_select(1, pack.starts.long())


def test_kernels_that_go_by_where_documents_begin_need_one_graph_for_all_packs():
    run, plain = (made("qwen3.5-shallow-tiny", graphed=graphed)[0] for graphed in (True, False))
    for own in (run, plain):
        for module in own.model.modules():
            if type(module) is PackedDeltaNet:
                module.__class__ = StartsNet
    for seed, lengths in enumerate(((70, 10), (64, 64), (1, 2, 3, 4), (5,) * 6, (100, 1))):
        batch = pack(run, seed, lengths=lengths)
        assert same(outcome(run, batch), outcome(plain, batch)), lengths
    assert run.micro_step.asked == set() and run.micro_step.counts == {REPLAYS: 5, CAPTURES: 1}


@pytest.mark.parametrize(("method", "asked"), [("lora", set()), ("full", {ROWS})])
def test_a_head_of_supervised_rows_gets_as_many_with_a_graph_as_without(method, asked):
    """Filled up inside a graph, which has a head that trains; a frozen one has as many as there are."""
    run, plain = (made(graphed=graphed, method=method)[0] for graphed in (True, False))
    for own in (run, plain):
        own.loss_head = supervised_cross_entropy
    rows = static.with_padded_rows if asked else lambda batch: batch
    batches = [pack(run, seed, lengths=lengths) for seed, lengths in enumerate(((5, 60), (100,), (50, 50)))]
    for batch in batches:
        assert same(outcome(run, batch), outcome(plain, rows(batch)))
    assert run.micro_step.asked == asked
    whole = one_document(LENGTH, run.model.config.vocab_size, 7).to("cpu")
    assert same(outcome(run, whole), outcome(plain, rows(whole)))


def test_layers_and_a_frozen_head_get_their_own_number_of_rows():
    """What layers ask for is filled up, with a graph and without; what the head gets is not."""
    run, plain = (made(graphed=graphed)[0] for graphed in (True, False))
    seen = []

    def head(model, hidden, batch):
        seen.append(len(batch.supervised_positions))
        return supervised_cross_entropy(model, hidden, batch)

    for own in (run, plain):
        supervised_mlp_patch.apply(own)
        own.loss_head = head
    batch = pack(run, 3)
    whole = one_document(LENGTH, run.model.config.vocab_size, 7).to("cpu")
    for own in (batch, whole, batch):
        padded = Pack.of(static.with_padded_rows(own))
        assert len(padded.rows) > own.supervised_tokens
        plain.micro_step = lambda run, batch, tokens, padded=padded: plain_micro_step(run, batch, tokens, padded)
        assert same(outcome(run, own), outcome(plain, own))
    assert run.micro_step.asked == {ROWS} and set(seen) == {batch.supervised_tokens, whole.supervised_tokens}


@pytest.mark.parametrize("lengths", [(192,), (64, 64, 64), (63, 65, 64), (1,) * 7 + (185,), (1, 2, 3, 186)])
def test_chunks_made_on_the_device_are_those_made_on_the_host(lengths):
    bounds = torch.tensor((0, *lengths)).cumsum(0).int()
    own = Pack(bounds, lengths)
    count = chunk_count(lengths)
    padded = torch.cat([bounds, bounds[-1:].expand(count - len(lengths))])
    found, real = chunk_indices(padded), len(own.chunk_indices)
    assert found.dtype == torch.int32 and len(found) == count >= real
    assert torch.equal(found[:real], own.chunk_indices)
    beyond = found[real:].long()
    assert bool((padded[beyond[:, 0] + 1] == padded[beyond[:, 0]]).all()) and not beyond[:, 1].any()


def test_a_chunk_is_named_by_its_document_and_its_place_there():
    own = Pack(torch.tensor((0, 70, 71, 135), dtype=torch.int32), (70, 1, 64))
    assert own.chunk_indices.tolist() == [[0, 0], [0, 1], [1, 0], [2, 0]]
    assert own.chunk_indices.dtype == torch.int32 and own.chunk_indices.is_contiguous()


@pytest.mark.parametrize("batch", [tricky_batch(LENGTH, 2, 99, 3), one_document(LENGTH, 99, 3)], ids=["many", "one"])
def test_rows_are_filled_up_with_ignored_ones(batch):
    rows = padded_rows(batch)
    supervised = len(batch.supervised_positions)
    assert torch.equal(rows[:supervised], batch.supervised_positions)
    assert len(rows) == row_count(supervised, batch.positions) > supervised
    assert bool((batch.labels.flatten()[rows[supervised:]] == IGNORE).all())
    assert row_count(0, 100) == 0 and row_count(65, 100) == 100 and row_count(1000, 5376) == 1024


def test_signatures_say_what_was_asked_and_no_more():
    one, other = (tricky_batch(LENGTH, 1, 99, 3, lengths) for lengths in ((70, 10), (5,) * 8))
    assert signature(one, frozenset()) == signature(other, frozenset()) == ((1, LENGTH),)
    for asked in (CHUNKS, GROUPS):
        assert signature(one, frozenset({asked})) != signature(other, frozenset({asked}))
