"""Kicked references, the noise floor that they make, and the batches that gradients are compared on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from abtest.evidence import noise_floor
from abtest.gate import loss_checks
from abtest.perturb import kick
from abtest.probes import (
    CROWD,
    FAR,
    MEMORISED,
    MEMORISED_LENGTH,
    REST,
    SHAPED,
    TRICKY_LENGTHS,
    Probe,
    cut,
    documents,
    memorised,
    memorised_batch,
    memorised_probes,
    off_grid,
    probes,
    supervised,
    tricky_batch,
)
from loop.batch import IGNORE, PackedBatch
from loop.config import OptimConfig
from loop.data.dataset import Dataset, Document
from loop.errors import UserError
from loop.optim import MasterAdamW


def small_run(dtype: torch.dtype) -> SimpleNamespace:
    """A frozen and a trained layer; a third of the trained weights are zero, one of them -0."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"frozen": nn.Linear(64, 96), "trained": nn.Linear(96, 60)}).to(dtype)
    model["frozen"].requires_grad_(False)
    with torch.no_grad():
        model["trained"].weight[::3] = 0.0
        model["trained"].weight[0, 0] = -0.0
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return SimpleNamespace(device=torch.device("cpu"), model=model, optimizer=MasterAdamW(trained, OptimConfig(), 3))


def kicked(dtype: torch.dtype, seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], SimpleNamespace]:
    run = small_run(dtype)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    kick(run, seed)
    return before, {name: p.detach() for name, p in run.model.named_parameters()}, run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_about_half_the_weights_move_by_exactly_one_ulp(dtype):
    before, after, _ = kicked(dtype, seed=1)
    up = down = total = 0
    for name, old in before.items():
        new, (above, below) = (
            after[name],
            (torch.nextafter(old, torch.full_like(old, end)) for end in (torch.inf, -torch.inf)),
        )
        assert torch.equal(new[old == 0].signbit(), old[old == 0].signbit()) and not new[old == 0].any()
        assert bool(((new == old) | (new == above) | (new == below)).all())
        up, down, total = up + int((new > old).sum()), down + int((new < old).sum()), total + int((old != 0).sum())
    assert up / total == pytest.approx(0.25, abs=0.02) and down / total == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masters_follow_the_weights(dtype):
    _, after, run = kicked(dtype, seed=1)
    for name, master in run.optimizer.masters.items():
        assert master.dtype is torch.float32 and torch.equal(master, after[name].float())


def test_a_kick_is_a_function_of_its_seed():
    one, again, other = (kicked(torch.float32, seed)[1]["frozen.weight"] for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_a_resync_only_what_trains_is_kicked(dtype):
    run = small_run(dtype)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    kick(run, 1, trained_only=True)
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"trained.weight", "trained.bias"} == set(run.optimizer.masters)


def test_the_noise_floor_is_the_root_mean_square_distance():
    assert noise_floor((8.0,), [(8.25,), (7.25,)]) == (math.sqrt((0.25**2 + 0.75**2) / 2),)


def test_steps_around_share_their_noise_and_none_has_less_than_its_own():
    """Eight replicas may agree at one step by luck."""
    reference, replica = (8.0,) * 7, (8.0, 8.0, 8.0, 9.0, 8.0, 8.0, 8.0)
    third, fourth, fifth = (math.sqrt(1 / count) for count in (3, 4, 5))
    ulp = 8 * 2.0**-23
    assert noise_floor(reference, [replica]) == (ulp, fourth, fifth, 1.0, fifth, fourth, ulp)
    assert noise_floor(reference[:3], [replica[2:5]]) == (third, 1.0, third)


def test_the_noise_floor_is_at_least_an_ulp_of_the_loss():
    assert noise_floor((8.0, -2.0, 0.0), []) == (8 * 2.0**-23, 2 * 2.0**-23, 0.0)
    assert noise_floor((8.0,), [(8.0,), (8.0,)]) == (8 * 2.0**-23,)


@given(st.lists(st.floats(-4, 4), min_size=1, max_size=8), st.floats(0.5, 16))
def test_the_noise_floor_does_not_depend_on_the_order_or_sign_of_replicas(distances, loss):
    forward = noise_floor((loss,), [(loss + d,) for d in distances])[0]
    backward = noise_floor((loss,), [(loss - d,) for d in reversed(distances)])[0]
    assert forward == pytest.approx(backward, rel=1e-6, abs=1e-6)
    assert forward <= max(abs(d) for d in distances) * (1 + 1e-9) + loss * 2.0**-22


@pytest.mark.parametrize("diverged", [math.nan, math.inf])
def test_a_replica_that_diverged_lets_nothing_through(diverged):
    reference = (8.0, 7.5, 7.0)
    sigma = noise_floor(reference, [(8.0, diverged, 7.0), (8.1, 7.4, 7.1)])
    assert not any(check.passed for check in loss_checks(reference, (8.0, 7.5, 7.01), sigma))


def test_loss_limits_are_hit_exactly():
    zeros, sigma = (0.0,) * 4, (0.25,) * 4
    worst, drift = loss_checks(zeros, (0.0, -1.5, 0.5, 1.0), sigma)
    assert (worst.value, worst.passed, worst.detail, drift.value) == (6.0, True, "step 1", 0.0)
    assert not loss_checks(zeros, (0.0, math.nextafter(1.5, 2), 0.0, 0.0), sigma)[0].passed
    _, drift = loss_checks(zeros, (0.5, 0.5, 0.5, 0.5), sigma)
    assert (drift.value, drift.passed) == (4.0, True)
    assert not loss_checks(zeros, (0.5, 0.5, 0.5, 0.5 + 1e-12), sigma)[1].passed


def test_without_a_floor_only_equal_losses_pass():
    assert all(check.passed for check in loss_checks((0.0, 0.0), (0.0, 0.0), (0.0, 0.0)))
    assert not any(check.passed for check in loss_checks((0.0, 0.0), (0.0, 1e-300), (0.0, 0.0)))


def rules(batch: PackedBatch) -> None:
    """What every batch must be, however it was made."""
    bounds, ids, labels = batch.cu_seqlens.tolist(), batch.input_ids.flatten(), batch.labels.flatten()
    rows, length = batch.input_ids.shape
    assert batch.cu_seqlens.dtype is torch.int32 and ids.dtype is labels.dtype is torch.int64
    assert (bounds[0], bounds[-1]) == (0, rows * length) and tuple(b - a for a, b in pairwise(bounds)) == batch.lengths
    assert set(range(0, rows * length + 1, length)) <= set(bounds)  # no document lies across two rows
    assert batch.supervised_tokens == int((labels != IGNORE).sum()) and batch.real_tokens <= rows * length
    for start, end in pairwise(bounds):
        assert end > start
        assert batch.position_ids.flatten()[start:end].tolist() == list(range(end - start))
        assert labels[end - 1] == IGNORE
        taught = (labels[start:end] != IGNORE).nonzero().flatten()
        assert torch.equal(labels[start:end][taught], ids[start:end][taught + 1])


@given(st.integers(2, 700), st.integers(1, 12), st.integers(0, 5))
def test_a_tricky_batch_keeps_the_rules_of_a_batch(pack_length, packs, seed):
    batch = tricky_batch(pack_length, packs, 50, seed)
    rules(batch)
    assert batch.input_ids.shape == (packs, pack_length) and batch.real_tokens == packs * pack_length
    assert int(batch.input_ids.min()) >= 0 and int(batch.input_ids.max()) < 50
    assert not (batch.position_ids[batch.labels != IGNORE] % 3 == 0).any()


def test_the_rest_of_a_long_pack_is_several_documents():
    lengths = tricky_batch(5376, 1, 4096, seed=0).lengths
    assert lengths[: len(TRICKY_LENGTHS)] == TRICKY_LENGTHS and sum(lengths) == 5376
    assert set(lengths[len(TRICKY_LENGTHS) : -1]) == {REST} and 0 < lengths[-1] <= REST


def test_a_tricky_batch_holds_what_trips_kernels():
    batch = tricky_batch(512, 2, 4096, seed=0)
    assert {1, 2, 3} <= set(batch.lengths) and {63, 64, 65, 128} <= set(batch.lengths)
    assert tuple(batch.lengths[: len(TRICKY_LENGTHS)]) == TRICKY_LENGTHS
    assert any(bound % 64 for bound in batch.cu_seqlens.tolist())
    long_and_ignored = [
        end - start
        for start, end in pairwise(batch.cu_seqlens.tolist())
        if end - start > 3 and (batch.labels.flatten()[start:end] == IGNORE).all()
    ]
    assert long_and_ignored  # a document that teaches nothing
    assert not torch.equal(batch.input_ids, tricky_batch(512, 2, 4096, seed=1).input_ids)


def dataset(length: int, sizes: Sequence[int], prompt: int = 0, taught: float = 0.5) -> Dataset:
    """A pack of `length` for every document. Of what follows the `prompt`, `taught` is supervised, the last token always."""
    draw, made = np.random.default_rng(0), []
    for size in sizes:
        mask = (draw.random(size) < taught) & (np.arange(size) >= prompt)
        mask[-1] = True
        made.append(Document.from_mask(draw.integers(0, 90, size, dtype=np.int32), mask))
    return Dataset(tuple(made), tuple((index,) for index in range(len(made))), length, 0, {}, "chats.jsonl", 0)


def flat(probe: Probe) -> list[int]:
    return [token for batch in probe for token in batch.input_ids.flatten().tolist()]


@given(
    length=st.integers(2, 300), sizes=st.lists(st.integers(2, 300), min_size=1, max_size=4), prompt=st.integers(0, 300),
    packs=st.integers(1, 3), seed=st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_probes_of_all_kinds_are_batches_that_teach_something(length, sizes, prompt, packs, seed):
    """Also where a pack holds next to nothing, and where all but the last token is prompt: a probe without a label has no
    gradient, and the oracle would end there."""
    data = dataset(length, [min(size, length) for size in sizes], prompt)
    made = probes(data, 10, packs, 90, seed)
    assert len(made) == 10
    for probe in made:
        assert supervised(probe) > 0
        for batch in probe:
            rules(batch)


@pytest.mark.parametrize("packs", [1, 2])
def test_the_kinds_of_probes(packs):
    data = dataset(512, [500] * 40)
    made = probes(data, 10, packs, 90)
    assert [[tuple(batch.input_ids.shape) for batch in probe] for probe in made] == [
        [(packs, 512)], [(packs, 512)], [(2, 192 if packs == 1 else 448)], [(1, 256)] * 2, [(packs, 512)],
        [(1, 448)], [(packs, 512)], [(1, 512)], [(packs, 512)], [(1, 256)] * 2,
    ]  # fmt: skip
    for index in (0, 4, 8):
        assert flat(made[index]) == flat(data.micro_batches(FAR + index, 1, packs))
    assert made[1][0].lengths[: len(TRICKY_LENGTHS)] == TRICKY_LENGTHS and made[7][0].lengths == (512,)
    one, other = (batch.supervised_tokens for batch in made[3])
    assert one > 3 * other > 0  # of one step, which must be divided by what both teach
    assert len({tuple(flat(probe)) for probe in made}) == 10


def test_probes_for_their_shape_do_not_grow_with_the_pack():
    shapes = [[tuple(batch.input_ids.shape) for batch in probe] for probe in probes(dataset(5376, [3000] * 10), 8, 1, 90)]
    whole, shaped = [(1, 5376)], [(1, SHAPED)]
    assert shapes == [whole, shaped, [(2, 960)], [(1, 1024)] * 2, whole, [(1, 1984)], shaped, whole]
    assert off_grid(SHAPED) % 128 == 64 and sum((*TRICKY_LENGTHS, *CROWD)) < SHAPED


def test_probes_are_a_function_of_their_seed_and_index():
    data = dataset(128, [100] * 300)
    one, again, longer, other = (probes(data, *given) for given in ((10, 1, 90), (10, 1, 90), (20, 1, 90), (10, 1, 90, 1)))
    assert [flat(probe) for probe in one] == [flat(probe) for probe in again] == [flat(probe) for probe in longer[:10]]
    assert not {tuple(flat(probe)) for probe in one} & {tuple(flat(probe)) for probe in (*longer[10:], *other)}


@pytest.mark.parametrize(("limit", "length"), [(1, 1), (63, 63), (64, 64), (191, 64), (192, 192), (512, 448), (5376, 5312)])
def test_off_the_grid(limit, length):
    assert off_grid(limit) == length


def test_a_document_is_cut_where_it_teaches():
    ids = torch.arange(10)
    for taught, length, kept in [({2}, 5, (0, 5)), ({4}, 5, (1, 6)), ({6, 8}, 5, (5, 10)), ({8}, 2, (8, 10)),
                                 ({0}, 99, (0, 10)), (set(), 4, (0, 4)), ({3, 9}, 5, (0, 5))]:  # fmt: skip
        labels = torch.tensor([at + 1 if at in taught - {9} else IGNORE for at in range(10)])
        found, own = cut(ids, labels, length)
        assert found.tolist() == list(range(*kept)), (taught, length)
        assert [t for t in own.tolist() if t != IGNORE] == [at + 1 for at in sorted(taught) if kept[0] <= at < kept[1] - 1]
    assert labels[3] == 4  # the document itself stays


def test_padding_is_no_document():
    batch = dataset(64, [40]).batch([0])
    assert batch.lengths == (40, 24) and [len(ids) for ids, _ in documents(batch)] == [40]


@given(length=st.integers(2, 64), sizes=st.lists(st.integers(1, 64), min_size=1, max_size=6), count=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_whatever_is_memorised_can_be_known_by_heart(length, sizes, count):
    own = memorised(dataset(length, [min(max(size, 2 - at), length) for at, size in enumerate(sizes)]))
    first = [int(ids[0]) for ids, _ in own]
    assert 1 <= len(own) <= MEMORISED and len(set(first)) == len(first)  # no two begin alike
    assert len({len(ids) for ids, _ in own}) == 1 and 2 <= len(own[0][0]) <= MEMORISED_LENGTH
    for batch in (memorised_batch(own), *(batch for probe in memorised_probes(own, count) for batch in probe)):
        rules(batch)
        assert batch.supervised_tokens > 0


@pytest.mark.parametrize("sizes", [[2], [2, 2, 2]], ids=str)
def test_documents_of_two_tokens_are_memorised_whole(sizes):
    data = dataset(8, sizes)
    assert {tuple(ids.tolist()) for ids, _ in memorised(data)} == {tuple(document.input_ids) for document in data.documents}


def test_a_token_alone_has_nothing_to_predict():
    with pytest.raises(UserError, match=r"^chats\.jsonl: no document has two tokens"):
        memorised(Dataset(dataset(2, [1, 1]).documents, ((0, 1),), 2, 0, {}, "chats.jsonl", 0))


def test_memorised_probes_are_parts_of_half_the_documents_in_another_order():
    own = memorised(dataset(128, [100] * 40))
    known = [ids.tolist() for ids, _ in own]
    made = memorised_probes(own, 8)
    for (batch,) in made:
        parts = [ids.tolist() for ids in batch.input_ids.flatten().split(batch.lengths)]
        assert len(parts) == len(own) // 2
        assert all(any(part == whole[: len(part)] for whole in known) for part in parts)
    assert len({tuple(flat(probe)) for probe in made}) == 8
    assert flat(memorised_probes(own, 1)[0]) == flat(made[0]) != flat(memorised_probes(own, 1, seed=1)[0])
