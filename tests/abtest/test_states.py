"""States: what is saved comes back, slow heads are slow, and the overfit state is one in which gradients are tiny."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import CONFIG, tiny, tricky
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from abtest import states
from abtest.gradients import Distances, compare
from abtest.limits import GEOMEAN
from abtest.oracle import exact_gradients, make_exact
from abtest.probes import memorised, memorised_batch, memorised_probes, probes, supervised
from abtest.states import Held
from abtest.uneven import LOGITS, SPREAD, uneven, uneven_last
from loop.batch import IGNORE, PackedBatch
from loop.data.dataset import Dataset, Document
from loop.model import canonical_name, forward_body
from loop.run import Run
from loop.shapes import SHAPES
from loop.training import build

pytestmark = pytest.mark.usefixtures("one_thread")


def built(model: str = "qwen3.5-tiny", method: str = "lora", dtype: str = "float32") -> Run:
    return build(dataclasses.replace(CONFIG, model=model, method=method, dtype=dtype))[0]


def test_a_run_has_four_states_and_is_resynced_twice() -> None:
    assert states.names(30) == ("step 0", "step 10, slow decay", "step 29, uneven vectors", "overfit")
    assert states.resync_steps(30) == (10, 20)
    assert states.resync_steps(2) == (1,)  # never before the first step, where there is nothing to hand on


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_is_saved_comes_back(method: str, dtype: str, tmp_path: Path) -> None:
    run, path = built(method=method, dtype=dtype), tmp_path / "state.safetensors"
    held = Held.of(run)
    run.micro_step(run, tricky(run, 0), 50)
    run.optimizer.step(0)
    wanted = {name: p.detach().clone() for name, p in held.parameters.items()}
    masters = {name: master.detach().clone() for name, master in run.optimizer.masters.items()}
    held.save(run, path)

    saved = load_file(path)
    assert saved.keys() == wanted.keys() and all(value.dtype == torch.float32 for value in saved.values())
    assert all(torch.equal(saved[name], master) for name, master in masters.items())

    other = built(method=method, dtype=dtype)
    Held.of(other).load(path)
    for name, parameter in Held.of(other).parameters.items():
        assert parameter.dtype == wanted[name].dtype and torch.equal(parameter, wanted[name])


def test_a_bf16_run_keeps_its_masters(tmp_path: Path) -> None:
    """They hold more bits than the weights: written to the file, not lost when another state is loaded."""
    run = built(method="full", dtype="bfloat16")
    held, first = Held.of(run), tmp_path / "first.safetensors"
    held.save(run, first)
    run.micro_step(run, tricky(run, 0), 50)
    run.optimizer.step(0)
    name = next(name for name in run.optimizer.masters if name.endswith("up_proj.weight"))
    master = run.optimizer.masters[name].clone()
    assert not torch.equal(master, master.bfloat16().float())
    held.save(run, tmp_path / "second.safetensors")
    held.load(first)
    assert torch.equal(run.optimizer.masters[name], master)
    assert not torch.equal(run.optimizer.parameters[name].float(), master.bfloat16().float())
    held.load(tmp_path / "second.safetensors")
    assert torch.equal(run.optimizer.parameters[name], master.bfloat16())


def test_the_oracle_gets_the_rounded_weights(tmp_path: Path) -> None:
    """A run raised to a higher precision after `Held.of` still computes on what the arm's dtype holds."""
    path, (run, _) = tmp_path / "state.safetensors", tiny("qwen3.5-tiny", "full")
    Held.of(run).save(run, path)
    exact = built(method="full", dtype="bfloat16")
    held = Held.of(exact)
    dtype = make_exact(exact)
    assert dtype == torch.float64
    held.load(path)
    for name, value in load_file(path).items():
        assert held.parameters[name].dtype == dtype
        assert torch.equal(held.parameters[name], value.bfloat16().to(dtype))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_slow_decay_is_every_other_heads_and_nothing_elses(method: str, tmp_path: Path) -> None:
    run = built(method=method)
    held = Held.of(run)
    held.save(run, tmp_path / "plain.safetensors")
    held.save(run, tmp_path / "slow.safetensors", states.SLOW)
    plain, slow = load_file(tmp_path / "plain.safetensors"), load_file(tmp_path / "slow.safetensors")
    changed = {name for name in plain if not torch.equal(plain[name], slow[name])}
    decays = [name for name in plain if name.endswith("A_log")]
    assert len(decays) == 3 and changed == set(decays)
    for name in decays:
        assert torch.equal(slow[name][1::2], plain[name][1::2])
        assert float(slow[name][::2].exp().max()) <= states.SLOW_DECAY * (1 + 1e-6)
    held.load(tmp_path / "slow.safetensors")
    held.load(tmp_path / "plain.safetensors")
    assert all(torch.equal(held.parameters[name], plain[name]) for name in plain)


def test_a_model_without_decay_has_no_slow_heads(tmp_path: Path) -> None:
    run = built("llama-tiny", "full")
    held = Held.of(run)
    held.save(run, tmp_path / "plain.safetensors")
    held.save(run, tmp_path / "slow.safetensors", states.SLOW)
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "slow.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("model", ["qwen3.5-tiny", "qwen3-tiny", "qwen2-tiny"])
def test_no_vector_of_the_uneven_state_is_all_alike(model: str, method: str, dtype: str, tmp_path: Path) -> None:
    """Norms around 0 and around 1, biases of 0 and of 1: all that random weights leave with one value. Matrices stay."""
    run = built(model, method, dtype)
    held, vectors = Held.of(run), {name: p for name, p in run.model.named_parameters() if p.ndim == 1}
    held.save(run, tmp_path / "plain.safetensors")
    held.save(run, tmp_path / "uneven.safetensors", states.UNEVEN)
    held.save(run, tmp_path / "again.safetensors", states.UNEVEN)
    plain, made = load_file(tmp_path / "plain.safetensors"), load_file(tmp_path / "uneven.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "uneven.safetensors").read_bytes()
    assert any(len(p.unique()) == 1 for p in vectors.values())
    held.load(tmp_path / "uneven.safetensors")
    assert all(len(p.unique()) > 1 for p in vectors.values())
    changed = {name for name in plain if not torch.equal(plain[name], made[name])}
    assert all(plain[name].ndim == 1 for name in changed) and len(changed) == len(vectors)
    for name in changed - {canonical_name(name) for name, p in vectors.items() if p is run.model.get_decoder().norm.weight}:
        if not name.endswith("A_log"):
            offset = float(plain[name].mean() == 0)
            ratio = ((made[name] + offset) / (plain[name] + offset)).log()
            assert float(ratio.abs().max()) <= SPREAD * 1.01 and float(ratio.std()) > SPREAD / 3
    held.load(tmp_path / "plain.safetensors")
    assert all(torch.equal(held.parameters[name].float(), plain[name]) for name in plain)


@torch.no_grad()
@pytest.mark.parametrize("model", ["qwen3.5-tiny", "llama-tiny"])
def test_logits_of_the_uneven_state_differ_as_a_trained_models_do(model: str, tmp_path: Path) -> None:
    run = built(model, "full")
    held, batch = Held.of(run), tricky(run, 0)
    logits = lambda: run.model.get_output_embeddings()(forward_body(run.model, batch))  # noqa: E731
    assert float(logits().std()) < LOGITS / 4
    held.save(run, tmp_path / "uneven.safetensors", states.UNEVEN)
    held.load(tmp_path / "uneven.safetensors")
    assert float(logits().std()) == pytest.approx(LOGITS, rel=0.2)


@torch.no_grad()
def test_vectors_and_logits_that_differ_stay_what_they_are() -> None:
    """A trained model's: its own are better than any that are made up."""
    generator = torch.Generator().manual_seed(0)
    for trained in (torch.randn(64, generator=generator), torch.rand(64, generator=generator) + 1, torch.ones(1)):
        assert uneven(trained, SPREAD, generator) is trained
    assert uneven_last(torch.ones(64), 2 * LOGITS, generator).equal(torch.ones(64))


def test_a_head_without_small_probabilities_shows_where_vectors_are_uneven(tmp_path: Path) -> None:
    """With a large vocabulary and random weights what filtered_cross_entropy leaves out adds up to next to nothing: an H200
    took it for rounding at the 2B shape. A norm in front of a random head takes out the direction in which it lies."""
    config = dataclasses.replace(CONFIG, model="wide", method="lora", dtype="bfloat16")
    with pytest.MonkeyPatch.context() as patch:
        kind, shape = SHAPES["qwen3-shallow-tiny"]
        patch.setitem(SHAPES, "wide", (kind, shape | {"vocab_size": 60_000, "hidden_size": 256}))
        runs = [build(config, enable)[0] for enable in ((), ("filtered_cross_entropy",), ("supervised_logits",))]
        oracle = build(config)[0]
    held, exact = [Held.of(run) for run in (*runs, oracle)], make_exact(oracle)
    worst, sizes = {}, {name: master.numel() for name, master in runs[0].optimizer.masters.items()}
    for state in ("", states.UNEVEN):
        held[0].save(runs[0], tmp_path / "state.safetensors", state)
        for one in held:
            one.load(tmp_path / "state.safetensors")
        distances = [Distances() for _ in runs]
        for number in range(3):
            batch = tricky(runs[0], number)
            truth = {name: g.clone() for name, g in exact_gradients(oracle, (batch,), exact).items()}
            for run, distance in zip(runs, distances, strict=True):
                gradients_into(distance, run, batch, truth)
        worst[state] = [compare(distances[0], other, sizes).geomean for other in distances[1:]]
    assert worst[states.UNEVEN][0] > max(5 * worst[""][0], 5 * GEOMEAN), worst
    assert all(honest < 1.05 for _, honest in worst.values()), worst


def gradients_into(distance: Distances, run: Run, batch: PackedBatch, truth: dict) -> None:
    run.optimizer.zero_grad()
    run.micro_step(run, batch, batch.supervised_tokens)
    distance.add(run.optimizer.gradients(), truth)


@torch.no_grad()
def probability(run: Run, batch) -> float:
    """The mean p(target) of the supervised positions."""
    logits = run.model.get_output_embeddings()(forward_body(run.model, batch)).float().flatten(0, 1)
    kept = batch.supervised_positions
    return float(logits.softmax(-1)[kept, batch.labels.flatten()[kept]].mean())


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("model", ["qwen3.5-tiny", "qwen3-tiny"])
def test_overfit_knows_its_documents_by_heart(model: str, method: str, tmp_path: Path) -> None:
    run, dataset = build(dataclasses.replace(CONFIG, model=model, method=method))
    own, config = memorised(dataset), run.optimizer.config
    loss, steps = states.overfit(run, own)
    assert loss <= states.OVERFIT_LOSS and steps < states.OVERFIT_STEPS
    assert run.optimizer.config == config
    batch = memorised_batch(own)
    assert probability(run, batch) > 0.99
    # Another run gets there by the file alone, raised norm and all, and the probes of that state are known by heart too.
    Held.of(run).save(run, tmp_path / "overfit.safetensors")
    other = built(model, method)
    Held.of(other).load(tmp_path / "overfit.safetensors")
    assert probability(other, batch) == probability(run, batch)
    for probe in memorised_probes(own, 4):
        assert supervised(probe) > 0 and probability(other, probe[0]) > 0.99


def largest_logit(run: Run) -> float:
    """What the best hidden state can reach for an average token: |norm's output| times |row of the head|."""
    head = run.model.get_output_embeddings().weight
    hidden = run.model.get_decoder().norm(torch.randn(64, head.shape[1], generator=torch.Generator().manual_seed(0)))
    return float(hidden.norm(dim=-1).mean() * head.float().norm(dim=1).mean())


@torch.no_grad()
@pytest.mark.parametrize("model", ["qwen3.5-tiny", "llama-tiny"])
def test_logits_are_raised_whatever_the_norm_multiplies_by(model: str) -> None:
    run = built(model, "full")
    weight = run.model.get_decoder().norm.weight
    zero_centred = model == "qwen3.5-tiny"
    weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    before, scales = largest_logit(run), weight + zero_centred
    assert before < states.REACH / 2
    scales = scales.clone()
    states.raise_logits(run)
    factor = (weight + zero_centred) / scales
    assert factor.max() / factor.min() == pytest.approx(1, rel=1e-3)  # every channel by the same
    assert largest_logit(run) == pytest.approx(states.REACH, rel=0.1)


def test_raised_logits_reach_the_masters() -> None:
    run = built("llama-tiny", "full", "bfloat16")
    states.raise_logits(run)
    assert torch.equal(run.optimizer.masters["model.norm.weight"], run.model.get_decoder().norm.weight.float())


def test_raising_logits_takes_no_memory_of_the_heads_size() -> None:
    """With 248,320 columns a copy in fp32 is 2 GB, for which nobody waits."""
    run, made = built("llama-tiny", "full", "bfloat16"), []
    head = run.model.get_output_embeddings().weight

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), named=None):
            answer = operator(*arguments, **(named or {}))
            made.extend(x.numel() for x in tree_leaves(answer) if isinstance(x, torch.Tensor) and x is not head)
            return answer

    with Watch():
        states.raise_logits(run)
    assert made and max(made) < head.numel()


@torch.no_grad()
def test_large_logits_stay_as_they_are() -> None:
    run = built("llama-tiny", "full")
    run.model.get_output_embeddings().weight.mul_(20)
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    states.raise_logits(run)
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())


def short(lengths: list[int]) -> Dataset:
    draw = np.random.default_rng(0)
    documents = tuple(Document.from_mask(draw.integers(0, 90, n, dtype=np.int32), np.ones(n, dtype=bool)) for n in lengths)
    return Dataset(documents, tuple((index,) for index in range(len(lengths))), 64, 0, {}, "here", 0)


@pytest.mark.parametrize("lengths", [[3] * 12, [4, 3, 2, 3, 5], [3], [64, 2, 2]], ids=str)
def test_very_short_documents_make_batches_all_the_same(lengths: list[int]) -> None:
    own = memorised(short(lengths))
    assert own and len({int(ids[0]) for ids, _ in own}) == len(own)
    for ids, labels in own:
        assert len(ids) == len(labels) >= 2 and torch.equal(labels[:-1], ids[1:]) and labels[-1] == IGNORE
    for made in (memorised_probes(own, 20), probes(short(lengths), 10, 1, 90)):
        for probe in made:
            assert supervised(probe) > 0


def test_an_oracle_exists_on_the_shortest_documents() -> None:
    run = built("qwen3-tiny", "full")
    own = memorised(short([3, 3, 3]))
    dtype = make_exact(run)
    for probe in memorised_probes(own, 3):
        found = exact_gradients(run, probe, dtype)
        assert all(bool(torch.isfinite(g).all()) for g in found.values())
        assert float(found["model.norm.weight"].norm()) > 0
