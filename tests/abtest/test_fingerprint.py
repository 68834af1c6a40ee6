"""Fingerprints: equal for equal bits, different for anything else."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from abtest import fingerprint as fp
from abtest.fingerprint import batch_fingerprint, fingerprint, fingerprints, rng_fingerprint, seams
from loop.batch import PackedBatch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8)


@st.composite
def tensors(draw, smallest: int = 1):
    """A flat tensor of any bits, NaN and both zeros among them."""
    dtype = draw(st.sampled_from(DTYPES))
    bytes_ = draw(st.binary(min_size=smallest * dtype.itemsize, max_size=40 * dtype.itemsize))
    whole = len(bytes_) // dtype.itemsize * dtype.itemsize
    return torch.frombuffer(bytearray(bytes_[:whole]), dtype=dtype).clone()


def of(*given: torch.Tensor | None) -> str:
    return fingerprint({f"t{index}": tensor for index, tensor in enumerate(given)})


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@given(tensors(), st.data())
def test_any_flipped_bit_shows(tensor, data):
    changed = tensor.clone()
    place = data.draw(st.integers(0, tensor.numel() * tensor.element_size() - 1))
    changed.view(torch.uint8)[place] ^= 1 << data.draw(st.integers(0, 7))
    assert of(tensor) != of(changed)


@given(tensors(smallest=2), st.data())
def test_any_other_order_shows(tensor, data):
    order = data.draw(st.permutations(range(tensor.numel())))
    moved = tensor[list(order)]
    assert (of(tensor) == of(moved)) == same_bits(tensor, moved)


@given(tensors(smallest=2), st.data())
def test_any_two_tensors_show(tensor, data):
    other = torch.frombuffer(
        bytearray(data.draw(st.binary(min_size=tensor.nbytes, max_size=tensor.nbytes))), dtype=tensor.dtype
    )
    assert (of(tensor) == of(other)) == same_bits(tensor, other)


@given(st.lists(st.floats(0.125, 9.0, width=32), min_size=1, max_size=9), st.data())
def test_any_flipped_signs_show(sizes, data):
    signs = data.draw(st.lists(st.sampled_from((1.0, -1.0)), min_size=len(sizes), max_size=len(sizes)))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        tensor = (torch.tensor(sizes, dtype=torch.float64) * torch.tensor(signs, dtype=torch.float64)).to(dtype)
        assert of(tensor) != of(-tensor)


def test_small_steps_that_cancel_show():
    tensor = torch.arange(64.0) + 1
    for steps in ((1, -2, 1), (1, -1, -1, 1), (-3, 3, 3, -3), (1, 0, -2, 0, 1)):
        changed = tensor.clone()
        changed.view(torch.int32)[10 : 10 + len(steps)] += torch.tensor(steps, dtype=torch.int32)
        assert of(tensor) != of(changed)


@given(tensors(), tensors())
def test_tensors_that_change_places_show(one, other):
    equal = (one.dtype, one.shape) == (other.dtype, other.shape) and same_bits(one, other)
    assert (of(one, other) == of(other, one)) == equal


def test_names_shapes_dtypes_and_absence_count():
    zeros = torch.zeros(4)
    prints = [
        fingerprint({"a": zeros}), fingerprint({"b": zeros}), fingerprint({}), fingerprint({"a": None}),
        fingerprint({"a": zeros, "b": None}), fingerprint({"a": zeros.view(2, 2)}), fingerprint({"a": zeros[:3]}),
        fingerprint({"a": zeros.int()}), fingerprint({"a": zeros.bool()}), fingerprint({"a": torch.zeros(0)}),
        fingerprint({"a": zeros, "b": zeros}), fingerprint({"a": torch.zeros(())}),
    ]  # fmt: skip
    assert len(set(prints)) == len(prints)


@given(st.lists(tensors(), min_size=1, max_size=4), st.data())
def test_each_tensor_alone_has_a_fingerprint_of_its_own_bits(given_tensors, data):
    named = {f"t{index}": tensor for index, tensor in enumerate(given_tensors)}
    marks = fingerprints(named)
    assert marks == {name: fingerprints({"": tensor})[""] for name, tensor in named.items()}
    name = data.draw(st.sampled_from(sorted(named)))
    changed = named[name].clone()
    changed.view(torch.uint8)[data.draw(st.integers(0, changed.nbytes - 1))] ^= 1
    assert {key for key, mark in fingerprints(named | {name: changed}).items() if mark != marks[key]} == {name}


def test_shapes_and_dtypes_count_for_each_tensor_alone():
    zeros = torch.zeros(4)
    given = {"a": zeros, "b": zeros.view(2, 2), "c": zeros[:3], "d": zeros.int(), "e": torch.zeros(0), "f": zeros.bfloat16()}
    assert len(set(fingerprints(given).values())) == len(given) and fingerprints({}) == {}
    assert fingerprints({"a": zeros, "b": zeros.clone()}) == dict.fromkeys("ab", fingerprints({"c": zeros})["c"])


def test_zeros_of_both_signs_and_every_nan_differ():
    nan = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    values = (torch.tensor([0.0]), torch.tensor([-0.0]), nan[:1], nan[1:])
    assert len({of(value) for value in values}) == 4


@settings(deadline=None)
@given(tensors(), st.integers(1, 9))
def test_chunks_change_nothing(tensor, chunk):
    whole, before = of(tensor), fp._CHUNK
    try:
        fp._CHUNK = chunk
        assert of(tensor) == whole
    finally:
        fp._CHUNK = before


def test_the_last_element_before_and_the_first_after_a_chunk_count(monkeypatch):
    monkeypatch.setattr(fp, "_CHUNK", 8)
    tensor = torch.arange(24.0)
    changed = [tensor.clone() for _ in range(24)]
    for place, other in enumerate(changed):
        other[place] += 0.5
    assert len({of(other) for other in (tensor, *changed)}) == 25
    assert of(tensor) != of(tensor.roll(8))


def test_layout_in_memory_does_not_count():
    square = torch.arange(36.0).view(6, 6)
    assert of(square.T) == of(square.T.contiguous()) != of(square)
    assert of(square[::2, 1::3]) == of(square[::2, 1::3].clone())
    assert of(torch.ones(1).expand(5)) == of(torch.ones(5))


@given(tensors())
def test_nothing_is_written(tensor):
    before = tensor.clone()
    of(tensor)
    assert same_bits(tensor, before)


def batch(**changes) -> PackedBatch:
    row = torch.arange(6)[None]
    fields = {
        "input_ids": row,
        "labels": row + 1,
        "position_ids": row,
        "cu_seqlens": torch.tensor([0, 6], dtype=torch.int32),
    }
    return PackedBatch(**(fields | {"real_tokens": 6, "supervised_tokens": 6} | changes))


def test_everything_that_a_model_is_fed_counts():
    row = torch.tensor([[0, 1, 2, 3, 5, 4]])
    others = [
        batch(input_ids=row), batch(labels=row), batch(position_ids=row), batch(supervised_tokens=5),
        batch(cu_seqlens=torch.tensor([0, 2, 6], dtype=torch.int32)),
    ]  # fmt: skip
    prints = [batch_fingerprint([other]) for other in (batch(), *others)]
    prints += [batch_fingerprint([]), batch_fingerprint([batch(), batch()]), batch_fingerprint([batch(), others[0]])]
    assert len(set(prints)) == len(prints)
    assert batch_fingerprint([batch()]) == prints[0]


def test_one_random_number_drawn_shows():
    with torch.random.fork_rng(devices=[]):
        before = rng_fingerprint(torch.device("cpu"))
        assert rng_fingerprint(torch.device("cpu")) == before
        torch.rand(1)
        assert rng_fingerprint(torch.device("cpu")) != before


def head(model, hidden, batch):
    """A loss head of another name."""


class OtherLinear(nn.Linear):
    """The same layer under another name."""


def run_with(**changes) -> SimpleNamespace:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model.config = SimpleNamespace(_attn_implementation="sdpa")
    fields = {"model": model, "optimizer": nn.Identity(), "loss_head": batch, "micro_step": of}
    return SimpleNamespace(**(fields | changes))


def swapped(change) -> SimpleNamespace:
    run = run_with()
    change(run.model)
    return run


def test_every_seam_counts_and_values_do_not():
    others = [
        run_with(optimizer=nn.ReLU()), run_with(loss_head=head), run_with(micro_step=functools.partial(of)),
        swapped(lambda model: model.__setitem__(0, OtherLinear(2, 2))), swapped(lambda model: model.append(nn.Identity())),
        swapped(lambda model: setattr(model.config, "_attn_implementation", "eager")),
        swapped(lambda model: setattr(model[0], "gradient_checkpointing", True)),
    ]  # fmt: skip
    prints = [seams(run) for run in (run_with(), *others)]
    assert len(set(prints)) == len(prints)
    other_values = swapped(lambda model: nn.init.ones_(model[0].weight))
    assert seams(other_values) == seams(copy.deepcopy(other_values)) == prints[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_fingerprint():
    tensor = torch.randn(1000, 7)
    assert of(tensor) == of(tensor.cuda())
