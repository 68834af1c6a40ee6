"""Packed and padded rows hold the same documents and teach the same, and a leak between them is seen."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import accumulate, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abtest.oracle import exact_arithmetic, make_exact, worst_error
from abtest.probes import pack
from kernels.packing import OPTIMIZATION, measure, patch
from kernels.packing.kernel import joined, split, stacked
from kernels.registry import with_recipes
from loop.batch import IGNORE, PackedBatch
from loop.config import Config, DataConfig
from loop.data.dataset import Dataset, Document
from loop.data.packing import pack_best_fit_shuffled
from loop.delta_net import PackedDeltaNet
from loop.errors import UserError
from loop.model import plain_micro_step
from loop.recipe import from_plain
from loop.rows import padded, padded_micro_step, passes, positions_of
from loop.training import build, train

CPU = torch.device("cpu")
CASES = {
    "ragged": ((1, 2, 70, 65, 3, 1, 50),),
    "one document as long as the pack": ((192,),),
    "two packs, one of one document": ((100, 28, 64), (192,)),
    "short ones": ((1, 2, 3, 1, 2, 2, 1),),  # of 2 tokens alone the gradient of attention's scores would be zero
}


def batch_of(*rows: tuple[int, ...], seed: int = 0, quiet: tuple[int, ...] = ()) -> PackedBatch:
    """Random documents of these lengths, all but the first position of each learned; `quiet`: those without a label."""
    generator = torch.Generator().manual_seed(seed)
    number, made = 0, []
    for lengths in rows:
        own = []
        for length in lengths:
            ids = torch.randint(300, (length,), generator=generator)
            labels = torch.cat([ids[1:], torch.tensor([IGNORE])])
            own.append((ids, torch.full_like(ids, IGNORE) if number in quiet else labels))
            number += 1
        made.append(own)
    return pack(made)


def contents(batches: list[PackedBatch], lengths: list[int] | None = None) -> list[tuple[list[int], list[int], list[int]]]:
    """Tokens, labels and positions of every document, in order; of padded rows the first `lengths` positions."""
    out, wanted = [], iter(lengths or ())
    for batch in batches:
        parts = [x.flatten() for x in (batch.input_ids, batch.labels, batch.position_ids)]
        for number, (start, end) in enumerate(pairwise(accumulate(batch.lengths, initial=0))):
            if number not in batch.padding:
                stop = start + next(wanted) if lengths else end
                out.append(tuple(part[start:stop].tolist() for part in parts))
    return out


@st.composite
def micro_batches(draw) -> PackedBatch:
    """As the data set makes them, with padding, unsupervised documents and one or more rows."""
    pack_length = draw(st.integers(2, 40))
    lengths = draw(st.lists(st.integers(1, pack_length), min_size=1, max_size=30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    documents = tuple(
        Document.from_mask(rng.integers(1, 1000, n).astype(np.int32), rng.random(n) < draw(st.sampled_from((0.0, 0.5, 1.0))))
        for n in lengths
    )
    packs = pack_best_fit_shuffled(lengths, pack_length)
    dataset = Dataset(documents, packs, pack_length, 7, {}, "test", 0)
    return dataset.micro_batches(draw(st.integers(0, 5)), 1, draw(st.integers(1, 3)))[0]


@given(batch=micro_batches(), capacity=st.integers(1, 60))
def test_every_layout_holds_the_same_documents(batch, capacity):
    own = contents([batch])
    lengths = [len(ids) for ids, _, _ in own]
    assert sum(lengths) == batch.real_tokens
    rows = padded(batch)
    packs = split(batch, capacity)
    assert contents(rows, lengths) == own == contents(packs) == contents([joined([batch])]) == contents([stacked([batch])])
    for made in (rows, packs, [joined([batch])]):
        assert sum(part.real_tokens for part in made) == batch.real_tokens
        assert sum(part.supervised_tokens for part in made) == batch.supervised_tokens
        for part in made:
            supervised = (part.labels.flatten() != IGNORE).nonzero().flatten()
            assert torch.equal(part.supervised_positions, supervised) and len(supervised) == part.supervised_tokens
            assert sum(part.supervised_by_document) == part.supervised_tokens
            assert part.lengths == tuple(torch.diff(part.cu_seqlens).tolist())


@given(batch=micro_batches())
def test_padded_rows_have_room_where_the_packs_had_it(batch):
    rows = padded(batch)
    assert all(part.positions <= batch.positions for part in rows)  # no document is longer than its pack
    assert all(set(part.lengths) == {part.input_ids.shape[1]} for part in rows)
    for part, after in pairwise(rows):  # greedy: the next document would not have had room
        first = next(n for n in range(after.input_ids.shape[1], 0, -1))
        assert (len(part.lengths) + 1) * max(part.input_ids.shape[1], 1) > batch.positions or first > part.input_ids.shape[1]


def test_passes():
    assert passes([3, 3, 3], 9) == [[0, 1, 2]]
    assert passes([3, 4, 3], 9) == [[0, 1], [2]]
    assert passes([1, 9, 1, 12], 9) == [[0], [1], [2], [3]]


@pytest.mark.parametrize("capacity", [1, 3, 100])
def test_packs_at_a_capacity(capacity):
    batch = batch_of((1, 2, 5, 1, 1))
    wanted = {1: [(1,), (2,), (5,), (1,), (1,)], 3: [(1, 2), (5,), (1, 1)], 100: [(1, 2, 5, 1, 1)]}
    assert [part.lengths for part in split(batch, capacity)] == wanted[capacity]


# Training


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """A tiny hybrid model in fp64 with all weights training."""
    cache = tmp_path_factory.mktemp("cache")
    config = Config(model="qwen3.5-shallow-tiny", method="full", device="cpu", dtype="float32")
    run, _ = build(replace(config, data=DataConfig(pack_length=192, cache_dir=cache, max_examples=40)))
    make_exact(run)
    return run


def gradients(run, micro_step, batch: PackedBatch) -> tuple[float, dict[str, torch.Tensor]]:
    run.optimizer.zero_grad()
    with exact_arithmetic(torch.float64):
        loss = float(micro_step(run, batch, max(batch.supervised_tokens, 1)))
    found = {name: g.clone() for name, g in run.optimizer.gradients().items()}
    run.optimizer.zero_grad()
    return loss, found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("quiet", [(), (0, 3)], ids=["", "some unsupervised"])
def test_packed_is_padded(exact, case, quiet):
    if sum(map(len, CASES[case])) == 1 and quiet:
        quiet = ()  # it would teach nothing at all
    batch = batch_of(*CASES[case], quiet=quiet)
    loss, truth = gradients(exact, padded_micro_step, batch)
    own_loss, own = gradients(exact, plain_micro_step, batch)
    assert loss == pytest.approx(own_loss, rel=1e-12) and loss > 0
    error, where = worst_error(own, truth)
    assert error < 1e-10, where
    for layout in (split(batch, 60), [joined([batch])]):

        def steps(run, whole, tokens, layout=layout):
            return torch.stack([plain_micro_step(run, part, tokens) for part in layout]).sum()

        assert worst_error(gradients(exact, steps, batch)[1], truth)[0] < 1e-10


def test_a_micro_step_that_teaches_nothing(exact):
    batch = batch_of((3, 2), quiet=(0, 1))
    for micro_step in (padded_micro_step, plain_micro_step):
        loss, found = gradients(exact, micro_step, batch)
        assert loss == 0 and not any(bool(g.any()) for g in found.values())


@pytest.mark.parametrize("leak", ["delta rule", "attention"])
def test_a_leak_over_a_boundary_is_seen(exact, leak, monkeypatch):
    batch = batch_of((50, 60, 82))
    _, truth = gradients(exact, padded_micro_step, batch)
    if leak == "attention":
        leaky = replace(batch, position_ids=torch.arange(192)[None])
    else:
        leaky, rule = batch, PackedDeltaNet.delta_rule

        def without_boundaries(self, q, k, v, g, beta, pack):
            return rule(self, q, k, v, g, beta, replace(pack, lengths=(q.shape[1],), cu_seqlens=pack.cu_seqlens[[0, -1]]))

        monkeypatch.setattr(PackedDeltaNet, "delta_rule", without_boundaries)
    assert worst_error(gradients(exact, plain_micro_step, leaky)[1], truth)[0] > 1e-4


def test_padding_counts_as_positions_and_not_as_tokens(tmp_path):
    data = DataConfig(pack_length=256, cache_dir=tmp_path, max_examples=60, fill="shuffled")
    config = Config(model="qwen3-tiny", device="cpu", dtype="float32", steps=2, data=data)
    packed = train(config)
    rows = replace(config, data=replace(data, rows="padded"))
    plain = train(rows)
    on = train(rows, ["packing"])
    assert [step.real_tokens for step in plain.steps] == [step.real_tokens for step in packed.steps]
    assert [step.supervised_tokens for step in plain.steps] == [step.supervised_tokens for step in packed.steps]
    assert plain.losses == pytest.approx(packed.losses, rel=1e-5)
    assert on.enabled == ("packing",) and on.losses == packed.losses  # the same program, bit for bit
    assert [step.positions for step in on.steps] == [256, 256] != [step.positions for step in plain.steps]


def test_positions_of_a_padded_run():
    batch = batch_of((1, 2, 5))
    assert positions_of(SimpleNamespace(micro_step=plain_micro_step), batch) == 8
    assert positions_of(SimpleNamespace(micro_step=padded_micro_step), batch) == 2 * 2 + 5


def test_it_has_its_reasons_in_words():
    assert "rows are packed already" in OPTIMIZATION.eligible(SimpleNamespace(micro_step=plain_micro_step))
    assert OPTIMIZATION.eligible(SimpleNamespace(micro_step=print)) == "another optimization already owns the micro-step"
    run = SimpleNamespace(micro_step=padded_micro_step)
    assert patch.eligible(run) is None
    patch.apply(run)
    assert run.micro_step is plain_micro_step


def test_its_recipe_is_a_recipe():
    config = with_recipes(Config(), ["packing", "silu_mul"])
    assert config == replace(Config(), data=DataConfig(rows="padded", fill="shuffled"))
    assert with_recipes(Config(), ["silu_mul"]) == Config()
    with pytest.raises(UserError, match=r"data\.rows is 'ragged'"):
        from_plain(Config(), {"data": {"rows": "ragged"}})


# The command


def test_every_layout_is_measured_on_the_same_documents(capsys, tmp_path):
    flags = ["--model", "qwen3-tiny", "--device", "cpu", "--data.cache-dir", str(tmp_path), "--data.max-examples", "60"]
    assert measure.main([*flags, "--data.pack-length", "256", "--rounds", "2", "--above", "3"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    rows = {row["layout"]: row for row in json.loads(last)["rows"]}
    assert list(rows) == ["padded", "mean", "longest", "pack", "rows", "above"] and len(lines) == 6
    assert rows["padded"]["ratio"] == 1.0 and rows["mean"]["waste"] == rows["longest"]["waste"] == 0.0
    assert rows["mean"]["micro_steps"] >= rows["longest"]["micro_steps"] >= rows["pack"]["micro_steps"] == 3
    assert (rows["above"]["micro_steps"], rows["above"]["longest_row"]) == (1, 768)
    assert (rows["rows"]["micro_steps"], rows["rows"]["longest_row"]) == (1, 256)
    with pytest.raises(UserError, match=r"--above 1 --rounds 2: at least 2"):
        measure.main([*flags, "--above", "1", "--rounds", "2"])


def test_layouts_are_measured_with_what_is_switched_on(capsys, tmp_path):
    flags = ["--model", "qwen3-tiny", "--device", "cpu", "--data.cache-dir", str(tmp_path), "--data.max-examples", "60"]
    flags += ["--data.pack-length", "256", "--rounds", "2", "--optimization"]
    assert measure.main([*flags, "static_lora", "supervised_logits"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["enabled"] == ["static_lora", "supervised_logits"]
    for names, words in (
        (["packing_above_mean"], "packing_above_mean: a micro-step has 1 pack"),
        (["cuda_graphs"], "cuda_graphs: "),
        (["nothing"], "nothing"),
    ):
        with pytest.raises(UserError, match=words):
            measure.main([*flags, *names])


def test_a_micro_step_that_is_somebody_s_own_is_not_measured():
    run = SimpleNamespace(refused={}, enabled=["cuda_graphs"], micro_step=lambda *arguments: None)
    with pytest.raises(UserError, match="cuda_graphs: one has a micro-step of its own"):
        measure._check(run)


def test_layouts_take_turns():
    own = [measure.Layout(name, (batch_of((3, 2)),)) for name in "abc"]
    seen: list[str] = []
    times = {"a": 4.0, "b": 2.0, "c": 1.0}
    seconds = measure.measured(own, lambda layout: seen.append(layout.name) or times[layout.name], 3)
    assert seen == [*"cab", *"abc", *"bca", *"cab"] and seconds == [[4.0, 2.0, 1.0]] * 3
    rows = measure.summary(own, seconds, [None, 1, 2])
    assert [row.ratio for row in rows] == [1.0, 2.0, 4.0] and rows[1].real_tokens_per_s == 2.5
