"""Packs and batches hold every document once, whole, and apart from the others."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loop.batch import IGNORE
from loop.data.dataset import Dataset, Document
from loop.data.packing import pack_best_fit_decreasing, pack_best_fit_shuffled

PAD = 7


@st.composite
def datasets(draw) -> Dataset:
    pack_length = draw(st.integers(2, 40))
    lengths = draw(st.lists(st.integers(1, pack_length), min_size=1, max_size=30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    documents = tuple(
        Document.from_mask(rng.integers(0, 1000, n).astype(np.int32), rng.random(n) < draw(st.floats(0, 1))) for n in lengths
    )
    packs = pack_best_fit_decreasing(lengths, pack_length)
    return Dataset(documents, packs, pack_length, PAD, {}, "test", draw(st.integers(0, 5)))


@given(lengths=st.lists(st.integers(1, 60), max_size=80), extra=st.integers(0, 20))
def test_every_document_is_in_one_pack_and_no_pack_overflows(lengths, extra):
    pack_length = max(lengths, default=1) + extra
    packs = pack_best_fit_decreasing(lengths, pack_length)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    totals = [sum(lengths[index] for index in pack) for pack in packs]
    assert all(0 < total <= pack_length for total in totals)
    # any-fit: no pack would have fitted into one before it
    assert all(totals[i] + totals[j] > pack_length for i in range(len(packs)) for j in range(i))
    assert packs == pack_best_fit_decreasing(lengths, pack_length)


def test_best_fit_takes_the_fullest_pack_with_room():
    assert pack_best_fit_decreasing([5, 7, 3, 4, 1], 10) == ((1, 2), (0, 3, 4))
    assert pack_best_fit_decreasing([6, 8, 2], 10) == ((1, 2), (0,))
    assert pack_best_fit_decreasing([], 10) == ()


def test_shuffled_packs_hold_every_document_and_mix_lengths():
    lengths = [1 + n % 50 for n in range(500)]
    packs = pack_best_fit_shuffled(lengths, 200)
    assert sorted(index for pack in packs for index in pack) == list(range(500))
    assert all(sum(lengths[index] for index in pack) <= 200 for pack in packs)
    assert packs == pack_best_fit_shuffled(lengths, 200)

    def spread(packs):
        return sum(max(lengths[i] for i in pack) - min(lengths[i] for i in pack) for pack in packs) / len(packs)

    assert spread(packs) > 2 * spread(pack_best_fit_decreasing(lengths, 200))


@pytest.mark.parametrize("lengths", [[11], [0], [-1]])
def test_lengths_that_cannot_be_packed(lengths):
    with pytest.raises(ValueError, match="between 1 and pack_length"):
        pack_best_fit_decreasing(lengths, 10)


def test_packing_many_documents_is_fast():
    lengths = np.random.default_rng(0).integers(1, 2048, 200_000).tolist()
    start = time.process_time()
    packs = pack_best_fit_decreasing(lengths, 2048)
    assert time.process_time() - start < 10
    assert sum(lengths) / (len(packs) * 2048) > 0.99


@settings(max_examples=150, deadline=None)
@given(dataset=datasets(), data=st.data())
def test_batches_hold_the_documents_token_by_token(dataset, data):
    packs = data.draw(st.lists(st.integers(0, len(dataset.packs) - 1), min_size=1, max_size=4))
    batch = dataset.batch(packs)
    length = dataset.pack_length
    assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (len(packs), length)
    assert {batch.input_ids.dtype, batch.labels.dtype, batch.position_ids.dtype} == {torch.int64}
    assert batch.cu_seqlens.dtype == torch.int32
    bounds = batch.cu_seqlens.tolist()
    assert bounds[0] == 0 and bounds[-1] == batch.positions == len(packs) * length
    assert all(a < b for a, b in pairwise(bounds))
    assert set(range(0, batch.positions + 1, length)) <= set(bounds)

    ids, labels, positions = (x.flatten().tolist() for x in (batch.input_ids, batch.labels, batch.position_ids))
    expected = []
    for pack in packs:
        documents = [dataset.documents[index] for index in dataset.packs[pack]]
        expected += [(document.input_ids, document.labels) for document in documents]
        if padding := length - sum(map(len, documents)):
            expected.append(([PAD] * padding, [IGNORE] * padding))
    assert len(expected) == len(bounds) - 1
    for (wanted_ids, wanted_labels), begin, end in zip(expected, bounds, bounds[1:], strict=False):
        assert ids[begin:end] == wanted_ids
        assert labels[begin:end] == wanted_labels
        assert labels[end - 1] == IGNORE
        assert positions[begin:end] == list(range(end - begin))
        assert all(labels[t] in (IGNORE, ids[t + 1]) for t in range(begin, end - 1))
    assert batch.supervised_tokens == sum(label != IGNORE for label in labels)
    assert batch.real_tokens == sum(len(dataset.documents[i]) for pack in packs for i in dataset.packs[pack])


@settings(max_examples=60, deadline=None)
@given(dataset=datasets(), grad_accum=st.integers(1, 3), packs=st.integers(1, 3), start=st.integers(0, 20))
def test_steps_take_every_pack_once_an_epoch_whatever_the_step_begins_with(dataset, grad_accum, packs, start):
    count = len(dataset.packs)
    order = [
        pack for epoch in range(-(-(start + 9) * grad_accum * packs // count) + 1) for pack in dataset.epoch_order(epoch)
    ]
    for step in range(start, start + 3):
        batches = dataset.micro_batches(step, grad_accum, packs)
        first = step * grad_accum * packs
        for index, batch in enumerate(batches):
            begin = first + index * packs
            assert torch.equal(batch.input_ids, dataset.batch(order[begin : begin + packs]).input_ids)
        assert len(batches) == grad_accum


def dataset_of(count: int, seed: int = 0) -> Dataset:
    documents = tuple(Document.from_mask(np.array([i, i + 1, i + 2], np.int32), np.ones(3, bool)) for i in range(count))
    return Dataset(documents, tuple((i,) for i in range(count)), 4, PAD, {}, "test", seed)


def test_epoch_order_depends_on_seed_and_epoch_alone():
    dataset = dataset_of(50)
    orders = [dataset.epoch_order(0), dataset.epoch_order(1), dataset_of(50, seed=1).epoch_order(0)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] and orders[0] != orders[2] and orders[1] != orders[2]
    assert dataset_of(50).epoch_order(1) == orders[1]
    assert dataset_of(8).epoch_order(3) == [1, 2, 3, 7, 4, 6, 5, 0]


def test_labels_are_shifted_once():
    document = Document.from_mask(np.array([10, 11, 12, 13], np.int32), np.array([True, False, True, True]))
    assert (document.input_ids, document.labels, document.supervised) == ([10, 11, 12, 13], [IGNORE, 12, 13, IGNORE], 2)


def test_wrong_calls_are_refused():
    dataset = dataset_of(3)
    with pytest.raises(ValueError, match="at least one pack"):
        dataset.batch([])
    for arguments in ((-1, 1, 1), (0, 0, 1), (0, 1, 0)):
        with pytest.raises(ValueError, match="must be >="):
            dataset.micro_batches(*arguments)


def test_statistics_add_up():
    numbers = dataset_of(5).statistics()
    assert numbers["documents"] == numbers["packs"] == 5
    assert (numbers["positions"], numbers["real_tokens"], numbers["supervised_tokens"]) == (20, 15, 10)
    assert numbers["packing_efficiency"] == 0.75 and numbers["padding_fraction"] == 0.25
    assert numbers["supervised_fraction"] == pytest.approx(2 / 3)
    assert numbers["lengths"] == dict.fromkeys(("min", "p10", "p25", "p50", "p75", "p90", "p99", "max"), 3)
    assert numbers["fewest_packs"] == 4
