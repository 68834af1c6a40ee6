"""cuda_graphs on a CPU: everything but the capture itself, with operators taped in place of kernels (`aten_tape`)."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from aten_tape import REFUSED, TapeRecorder
from graphed import CONFIG, LENGTH, made, outcome, pack, same
from torch import nn

from abtest import structure
from abtest.dropout import dropout_config
from abtest.dropout import examine as examine_dropout
from abtest.free_run import free_run
from abtest.probes import one_document
from abtest.tripwire import bent
from kernels.cuda_graphs import inputs as static
from kernels.cuda_graphs import micro_step, patch
from kernels.cuda_graphs.micro_step import CAPTURES, PLAIN, REPLAYS, GraphedMicroStep
from kernels.cuda_graphs.recorder import CudaRecorder
from kernels.supervised_logits.kernel import supervised_cross_entropy
from loop.config import LoraConfig
from loop.delta_net import Pack, PackedDeltaNet
from loop.model import plain_micro_step
from loop.training import build, switch_on

pytestmark = pytest.mark.usefixtures("taped")
ONE_ROW = "every row is one document"


# A replay is the micro-step that it stands for


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("model", ["qwen3.5-shallow-tiny", "qwen3-shallow-tiny", "mistral-tiny"])
def test_replays_have_the_bits_of_the_loop(model, method, checkpointed):
    run, _ = made(model, method=method, gradient_checkpointing=checkpointed)
    plain, _ = made(model, graphed=False, method=method, gradient_checkpointing=checkpointed)
    sequences = [(1,), (2,), (3, 4, 5), (1,), (5, 4)]
    for seeds in sequences:
        batches = [pack(plain, seed) for seed in seeds]
        assert same(outcome(run, *batches), outcome(plain, *batches)), seeds
    assert run.micro_step.counts == {REPLAYS: 8, CAPTURES: 2}  # of a step's first micro-step, and of a later one


@pytest.mark.parametrize(("method", "graphs_a_step"), [("lora", 4), ("full", 2)])
def test_a_whole_run_has_the_bits_of_the_loop_and_as_many_graphs_in_every_step(method, graphs_a_step):
    """Of its two micro-steps; the head is between two graphs where it is frozen."""
    answers = []
    for graphed in (False, True):
        run, dataset = made("qwen3.5-shallow-tiny", graphed=graphed, method=method)
        answers.append(free_run(run, dataset, 4, lambda done, steps: None))
    plain, graphs = answers
    assert (graphs.pop("replays"), plain.pop("replays")) == ([graphs_a_step] * 4, [0, 0, 0, 0])
    assert graphs == plain


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_add_up_after_a_micro_step_without_a_graph(dtype):
    """bf16 adds in fp32 masters, fp32 in the parameters' own gradients; both move into the buffers that graphs add to."""
    run, plain = (made(graphed=graphed, dtype=dtype)[0] for graphed in (True, False))
    whole = one_document(LENGTH, run.model.config.vocab_size, 7).to("cpu")
    for batches in ((whole, pack(run, 1), pack(run, 2)), (pack(run, 1), whole, pack(run, 2), whole)):
        assert same(outcome(run, *batches), outcome(plain, *batches))
    assert run.micro_step.counts[PLAIN + ONE_ROW] == 3 and run.micro_step.counts[REPLAYS] == 4


@pytest.mark.parametrize("full", [False, True], ids=["room", "no room"])
def test_graphs_make_room_for_a_micro_step_without_one(full):
    """What they gathered stays: only their memory goes, and the next micro-step is captured anew."""
    run, plain = (made(graphed=graphed)[0] for graphed in (True, False))
    whole = one_document(LENGTH, run.model.config.vocab_size, 7)
    recorder, step = run.micro_step.recorder, run.micro_step
    recorder.full = full
    batches = (pack(run, 1), whole, pack(run, 2))
    assert same(outcome(run, *batches), outcome(plain, *batches))
    assert step.counts == {PLAIN + ONE_ROW: 1, REPLAYS: 2, CAPTURES: 2}
    assert (recorder.released, len(step.graphs)) == ((1, 1) if full else (0, 2))
    assert same(outcome(run, whole), outcome(plain, whole)) and recorder.released == (2 if full else 0)
    assert same(outcome(run, whole), outcome(plain, whole)) and recorder.released == (2 if full else 0)  # none is left


def test_a_loss_outlives_the_next_replay():
    run, _ = made()
    first = run.micro_step(run, pack(run, 1), 50)
    value = float(first)
    second = run.micro_step(run, pack(run, 2), 50)
    assert float(first) == value != float(second)


def test_what_gets_no_gradient_has_none():
    run, plain = (made(graphed=graphed)[0] for graphed in (True, False))
    for own in (run, plain):
        extra = nn.Parameter(torch.ones(3))
        own.optimizer.parameters["unused"] = own.optimizer.masters["unused"] = extra
        outcome(own, pack(own, 1))
        own.micro_step(own, pack(own, 1), 50)
    assert run.optimizer.gradients()["unused"] is plain.optimizer.gradients()["unused"] is None


def test_the_supervised_tokens_of_the_step_are_followed():
    run, plain = (made(graphed=graphed)[0] for graphed in (True, False))
    for tokens in (50, 0, 1, 3, 16_777_217, 77):
        for own in (run, plain):
            own.optimizer.zero_grad()
            own.micro_step(own, pack(own, 1), tokens)
        assert same(list(run.optimizer.gradients().values()), list(plain.optimizer.gradients().values())), tokens
    assert run.micro_step.counts == {REPLAYS: 6, CAPTURES: 1}


# The gate's own checks


@pytest.mark.parametrize("model", ["qwen3.5-shallow-tiny", "qwen3-shallow-tiny"])
def test_the_structure_checks_pass(model):
    run, _ = made(model)
    probes = [(pack(run, 1, rows=2),), (pack(run, 2),)]
    wrong = [f.name for f in structure.examine(run, probes, 3, lambda done, total: None) if not f.passed]
    assert wrong == []
    assert run.micro_step.counts[REPLAYS] >= 30
    assert {key for key in run.micro_step.counts if key.startswith(PLAIN)} == {PLAIN + ONE_ROW}  # "other boundaries"


def test_dropout_draws_what_the_loop_draws():
    run, plain = (made(graphed=graphed, lora=LoraConfig(rank=4, dropout=0.25))[0] for graphed in (True, False))
    for seed in (1, 2, 1):
        results = []
        for own in (run, plain):
            torch.manual_seed(seed)
            results.append((outcome(own, pack(own, 1), pack(own, 2)), torch.get_rng_state()))
        assert same(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert run.micro_step.counts[REPLAYS] == 6


def test_the_dropout_checks_pass():
    run, _ = build(dropout_config(dataclasses.replace(CONFIG, model="qwen3-shallow-tiny")))
    run.micro_step = GraphedMicroStep(TapeRecorder())
    assert [f.name for f in examine_dropout(run, pack(run, 1), lambda done, total: None) if not f.passed] == []


def test_bending_a_part_bends_the_micro_step_and_is_over_afterwards():
    run, _ = made()
    straight = outcome(run, pack(run, 1))
    for name in ("run.loss_head", "model.layers.0.mlp"):
        with bent(run, [name]):
            assert not same(outcome(run, pack(run, 1)), straight), name
        assert same(outcome(run, pack(run, 1)), straight), name


# What can't be captured runs plainly, and is counted


class Lengths(PackedDeltaNet):
    def convolve(self, x: torch.Tensor, pack: Pack) -> torch.Tensor:
        return super().convolve(x, Pack(pack.cu_seqlens, pack.lengths))


def test_lengths_on_the_host_are_an_obstacle(caplog):
    run, plain = (made("qwen3.5-shallow-tiny", graphed=graphed)[0] for graphed in (True, False))
    next(module for module in run.model.modules() if type(module) is PackedDeltaNet).__class__ = Lengths
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert same(outcome(run, pack(run, 1)), outcome(plain, pack(run, 1)))
    assert run.micro_step.counts == {PLAIN + "a layer reads document lengths on the host": 3}
    assert len(caplog.records) == 1 and run.micro_step.recorder.warmed == 1


def _waiting_head(*runs) -> None:
    head = runs[0].loss_head
    for run in runs:
        run.loss_head = lambda model, hidden, batch: head(model, hidden, batch) * (1 if float(hidden.detach().sum()) else 2)


def test_a_frozen_head_is_in_no_graph_and_may_wait():
    run, plain = (made(graphed=graphed)[0] for graphed in (True, False))
    _waiting_head(run, plain)
    assert same(outcome(run, pack(run, 1), pack(run, 2)), outcome(plain, pack(run, 1), pack(run, 2)))
    assert run.micro_step.counts == {REPLAYS: 2, CAPTURES: 2}


def test_a_frozen_head_that_gives_no_gradient_leaves_none():
    """A loss that hidden states have no part in: what the last micro-step sent back must not come again."""
    run, plain = (made(graphed=graphed)[0] for graphed in (True, False))
    head = run.loss_head
    outcome(run, pack(run, 1))
    for own in (run, plain):
        own.loss_head = lambda model, hidden, batch: head(model, hidden * 0 if batch is quiet else hidden, batch)
    quiet = pack(run, 2)
    for batch in (pack(run, 1), quiet, pack(run, 3)):
        assert same([x + 0 for x in outcome(run, batch)], [x + 0 for x in outcome(plain, batch)])  # -0 is 0 here


def test_a_wait_for_the_device_is_an_obstacle_and_leaves_nothing_behind():
    run, plain = (made(graphed=graphed, method="full")[0] for graphed in (True, False))
    _waiting_head(run, plain)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert same(outcome(run, pack(run, 1), pack(run, 2)), outcome(plain, pack(run, 1), pack(run, 2)))
    assert torch.equal(torch.get_rng_state(), state)
    assert run.micro_step.counts == {PLAIN + f"{REFUSED}: aten::_local_scalar_dense": 2}


def test_memory_that_is_short_for_a_capture_is_no_obstacle_for_the_next(monkeypatch):
    run, plain = (made(graphed=graphed)[0] for graphed in (True, False))
    with monkeypatch.context() as patched:
        patched.setattr(run.micro_step.recorder, "warm", _no_memory)
        assert same(outcome(run, pack(run, 1)), outcome(plain, pack(run, 1)))
    assert run.micro_step.counts == {PLAIN + "no memory for a graph": 1}
    assert same(outcome(run, pack(run, 1)), outcome(plain, pack(run, 1)))
    assert run.micro_step.counts[REPLAYS] == run.micro_step.counts[CAPTURES] == 1


def test_where_memory_stays_short_captures_are_tried_less_and_less_often(monkeypatch):
    """A try warms up and records before it fails, and graphs that made room for it are to be captured anew."""
    run, plain = (made(graphed=graphed)[0] for graphed in (True, False))
    batch, tried = pack(run, 1), []
    monkeypatch.setattr(micro_step, "LONGEST_PAUSE", 4)
    with monkeypatch.context() as patched:
        counts = run.micro_step.counts
        patched.setattr(run.micro_step.recorder, "warm", lambda work: tried.append(counts.total()) or _no_memory(work))
        for _ in range(20):
            assert same(outcome(run, batch), outcome(plain, batch))
    assert tried == [0, 1, 3, 6, 11, 16]
    for _ in range(5):
        assert same(outcome(run, batch), outcome(plain, batch))
    assert run.micro_step.counts == {PLAIN + "no memory for a graph": 21, REPLAYS: 4, CAPTURES: 1}
    assert run.micro_step.pause == 0


def _no_memory(work: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_onlookers_see_python_run():
    run, _ = made()
    seen = []
    outcome(run, pack(run, 1))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append("saved") or x, lambda x: x):
        outcome(run, pack(run, 1))
    handle = run.model.model.layers[0].register_forward_hook(lambda *_: seen.append("layer"))
    outcome(run, pack(run, 1))
    handle.remove()
    outcome(run, pack(run, 1))
    assert seen.count("layer") == 1 and "saved" in seen
    assert run.micro_step.counts == {
        REPLAYS: 2, CAPTURES: 1, PLAIN + "hooks watch what is saved for backward": 1, PLAIN + "hooks watch a module": 1,
    }  # fmt: skip


@pytest.mark.parametrize("change", ["module", "parameter", "mode", "head", "buffer"])
def test_what_becomes_another_object_is_captured_anew(change):
    run, plain = (made("llama-tiny", graphed=graphed)[0] for graphed in (True, False))
    for own in (run, plain):
        outcome(own, pack(own, 1))
        layer, rotary = own.model.model.layers[0], own.model.model.rotary_emb
        if change == "module":
            layer.mlp.act_fn = nn.ReLU()
        elif change == "parameter":
            layer.input_layernorm.weight = nn.Parameter(layer.input_layernorm.weight.detach() * 2, requires_grad=False)
        elif change == "mode":
            own.model.train(False)
        elif change == "buffer":
            rotary.inv_freq = rotary.inv_freq * 2
        else:
            own.loss_head = lambda model, hidden, batch: supervised_cross_entropy(model, hidden, batch) * 2
    batch = static.with_padded_rows(pack(plain, 1)) if change == "head" else pack(plain, 1)
    assert same(outcome(run, pack(run, 1)), outcome(plain, batch))
    assert run.micro_step.counts == {REPLAYS: 2, CAPTURES: 2}


def test_the_graph_used_longest_ago_makes_room(monkeypatch):
    monkeypatch.setattr(micro_step, "MOST_GRAPHS", 2)
    run, _ = made()
    one, two, three = (pack(run, 1, rows) for rows in (1, 2, 3))
    for batch in (one, two, one, three, one, two):
        outcome(run, batch)
    assert run.micro_step.counts == {REPLAYS: 6, CAPTURES: 4} and len(run.micro_step.graphs) == 2


def test_packs_that_never_repeat_are_given_up_and_known_ones_go_on(monkeypatch):
    monkeypatch.setattr(micro_step, "PATIENCE", 2)
    run, plain = (made(graphed=graphed)[0] for graphed in (True, False))
    for rows in (1, 2, 3, 1):
        assert same(outcome(run, pack(run, 1, rows)), outcome(plain, pack(run, 1, rows)))
    assert run.micro_step.counts == {REPLAYS: 3, CAPTURES: 2, PLAIN + "packs repeat too rarely for graphs to pay": 1}


# The optimization


def test_eligible_says_why_not():
    run, _ = made(graphed=False)
    assert patch.eligible(run) is None
    run.micro_step = lambda *_: None
    assert patch.eligible(run) == "another optimization already owns the micro-step"
    run.micro_step, run.optimizer = plain_micro_step, object()
    assert "has no masters" in patch.eligible(run)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused_in_words():
    run, _ = made(graphed=False)
    switch_on(run, ["cuda_graphs"])
    assert run.refused == {"cuda_graphs": "needs a CUDA device; this run is on cpu"} and run.micro_step is plain_micro_step


# With a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("model", ["qwen3.5-shallow-tiny", "qwen3-shallow-tiny"])
def test_on_a_gpu_replays_have_the_bits_of_the_loop(model, method, checkpointed, dropout, monkeypatch):
    monkeypatch.undo()  # the real CUDAGraph
    lora = LoraConfig(rank=4, alpha=8.0, dropout=dropout)
    changes = {"method": method, "gradient_checkpointing": checkpointed, "lora": lora, "device": "cuda", "dtype": "bfloat16"}
    run, plain = (made(model, graphed=False, **changes)[0] for _ in range(2))
    switch_on(run, ["cuda_graphs"])
    assert run.refused == {}
    for seeds in ((1,), (2,), (3, 4, 5), (1,), (5, 4)):
        results = []
        for own in (run, plain):
            torch.manual_seed(len(seeds))
            results.append((outcome(own, *(pack(own, seed) for seed in seeds)), torch.cuda.get_rng_state()))
        assert same(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1]), seeds
    assert run.micro_step.counts == {REPLAYS: 8, CAPTURES: 2}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_graphs_give_their_memory_back(monkeypatch):
    monkeypatch.undo()  # the real CUDAGraph
    recorder, x = CudaRecorder(torch.device("cuda", 0)), torch.zeros(1 << 26, device="cuda")

    def work() -> None:
        x.add_(x.sin())

    recorder.warm(work)
    graph, before = recorder.record(work), torch.cuda.memory_reserved()
    assert recorder.taken >= x.nbytes and not recorder.crowded()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (x.nbytes // 2, 1 << 37))
    assert recorder.crowded()
    graph.reset()
    recorder.release()
    assert recorder.taken == 0 and torch.cuda.memory_reserved() <= before - x.nbytes
