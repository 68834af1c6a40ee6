"""What a micro-step runs and what that proves of a candidate; how gradients are compared; FLOPs a position by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tiny import CONFIG, gradients, tiny, two_probes
from torch import nn

from abtest.catalogue import find
from abtest.census import Change, changes, counted_replays, model_flops, work
from abtest.evidence import Evidence
from abtest.gradients import Distances, compare, pooled
from abtest.limits import ROW, ROW_FLOOR
from abtest.preflight import preflight
from kernels import registry
from loop.run import Run
from loop.training import accumulate, build

# Weights of each matrix as (in, out); a delta layer and one of attention, vocabulary of 4096
MLP = [(128, 384), (128, 384), (384, 128)]
DELTA = [(128, 256), (128, 128), (128, 128)]  # in_proj_qkv: 2 x 64 keys + 128 values; in_proj_z; out_proj
DECAY = [(128, 4), (128, 4)]  # in_proj_a and in_proj_b, without adapters
ATTENTION = [(128, 256), (128, 64), (128, 64), (128, 128)]  # q with its gate, k, v, o
HEAD = [(128, 4096)]
ADAPTED = 2 * MLP + DELTA + ATTENTION
ALL = ADAPTED + DECAY + HEAD
WEIGHTS = sum(width * height for width, height in ALL)
RANK = CONFIG.lora.rank
ADAPTERS = sum(RANK * (width + height) for width, height in ADAPTED)


@pytest.mark.parametrize("enabled", [(), ("static_lora",)], ids=["PEFT", "static_lora"])
def test_lora_takes_four_a_frozen_weight_and_six_a_trained_one(enabled):
    run, _ = build(CONFIG, enabled)
    assert model_flops(run) == 4 * WEIGHTS + 6 * ADAPTERS


def test_full_takes_six_a_weight():
    run, _ = build(dataclasses.replace(CONFIG, method="full"))
    assert model_flops(run) == 6 * WEIGHTS


def test_work_is_counted_by_name():
    """x [2, 8] through two layers of 8 x 4 and 4 x 8: two products forward, four backward less the one for x."""
    model, x = nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 8)), torch.ones(2, 8)
    counted = work(lambda: model(x).sum().backward(), cuda=False)
    assert counted["modules"] == {
        "torch.nn.modules.activation.GELU": 1, "torch.nn.modules.container.Sequential": 1,
        "torch.nn.modules.linear.Linear": 2,
    }  # fmt: skip
    products = counted["operators"]
    assert (products["aten::addmm"], products["aten::mm"]) == (2, 3)
    assert products["aten::gelu"] == products["aten::gelu_backward"] == 1
    assert counted["kernels"] == {}
    inputs = 2 * (8 + 4 + 4)  # of the first layer, of GELU, of the second layer
    assert counted["kept"] == {"bytes for backward": 4 * (inputs + 4 * 8)}  # and the second layer's weight, for GELU's sake


def test_counting_ends_with_an_error():
    model = nn.Linear(2, 2)
    with pytest.raises(ZeroDivisionError):
        work(lambda: 1 / 0, cuda=False)
    assert work(lambda: None, cuda=False) == {
        "operators": {},
        "modules": {},
        "kernels": {},
        "kept": {"bytes for backward": 0},
    }
    model(torch.ones(1, 2))


def test_changes_are_what_is_new_and_what_is_gone():
    reference = {"operators": {"mm": 4, "copy": 2, "norm x": 1}, "modules": {"Norm": 3}, "kept": {"bytes": 800}}
    candidate = {"operators": {"mm": 5, "copy": 1, "own": 2, "own x": 1}, "modules": {"Norm": 3}, "kept": {"bytes": 700}}
    change = changes(reference, candidate)
    assert change == Change(("own x2", "own x x1"), ("copy -1", "norm x -1", "bytes -100"))
    assert change.new_names == ["own", "own x"]
    assert changes(reference, reference) == Change((), ())


class Graph:
    """Stands in for a CUDA graph, which needs a device."""

    replayed = 0

    def replay(self) -> None:
        self.replayed += 1


def test_replays_are_counted_as_long_as_asked_and_still_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    one, other, original = Graph(), Graph(), Graph.replay
    with counted_replays() as outer:
        one.replay()
        with pytest.raises(ZeroDivisionError), counted_replays() as inner:
            one.replay()
            other.replay()
            raise ZeroDivisionError
        other.replay()
    one.replay()
    assert (inner, outer) == ([2], [4]) and (one.replayed, other.replayed) == (3, 2)
    assert Graph.replay is original


# What a candidate's gradients are compared by


@pytest.mark.parametrize(("start", "shared"), [(0, True), (5, True), (6, False)])
def test_gradients_in_overlapping_buffers_are_a_problem(start, shared):
    buffer, found = torch.zeros(11), Distances()
    found.add({"p": buffer[:6], "q": buffer[start : start + 5]}, {"p": torch.ones(6), "q": torch.ones(5)})
    problems = [problem.partition(": ")[2] for problem in found.problems]
    assert [words.startswith("shares memory with the gradient of ") for words in problems] == [True] * shared


def test_small_tensors_of_one_name_are_pooled_and_larger_ones_are_not():
    sizes = {"layers.0.a": 63, "layers.0.b": 64, "layers.1.a": 63, "layers.1.b": 64, "norm": 4}
    together = {"layers.*.a": ["layers.0.a", "layers.1.a"]}
    assert pooled(sizes) == together | {name: [name] for name in ("layers.0.b", "layers.1.b", "norm")}


def worst_row(*candidate: float, gradients: tuple[float, float] = (1.0, 1.0)) -> float:
    """The worst row's ratio beside a reference with no error in one row of two, and a mean square of one. gradients: of
    both rows, squared."""

    def side(*rows: float) -> Distances:
        sums = {"p": [sum(rows)]}
        return Distances(sums, sums, sums, {"p": torch.tensor([rows, gradients], dtype=torch.float64)})

    return compare(side(0.0, 2.0), side(*candidate), {"p": 64}).row


def test_a_row_without_error_allows_what_its_floor_allows():
    floor = ROW_FLOOR**2
    assert worst_row(0.0, 2.0) == 1.0
    assert worst_row(floor * (ROW**2 - 1), 2.0) == pytest.approx(ROW)
    assert worst_row(0.0, 4.0) == pytest.approx(math.sqrt((4 + floor) / (2 + floor)))
    assert not worst_row(math.nan, 2.0) <= ROW and not worst_row(math.inf, 2.0) <= ROW


@pytest.mark.parametrize(("square", "times"), [(1.8, 1.8), (0.2, 1.0), (0.0, 1.0), (2.0, 2.0)])
def test_a_row_s_floor_grows_with_its_gradient_and_does_not_shrink_with_it(square, times):
    """square: its gradient's, over the mean row's."""
    floor = times * ROW_FLOOR**2
    assert worst_row(floor * (ROW**2 - 1), 2.0, gradients=(square, 2.0 - square)) == pytest.approx(ROW)


def test_where_there_is_no_gradient_at_all_a_row_s_floor_is_what_it_was():
    assert worst_row(ROW_FLOOR**2 * (ROW**2 - 1), 2.0, gradients=(0.0, 0.0)) == pytest.approx(ROW)


# Proof that a candidate ran

NO_WORK = "it has the reference's bits and still does all of the reference's work"
SAME = {"operators": {"mm": 4, "copy": 2}, "modules": {"Norm": 3}, "kernels": {"gemm": 4}, "kept": {"bytes": 800}}
LESS = {"operators": "mm", "modules": "Norm", "kernels": "gemm", "kept": "bytes"}


def arm(counts: dict, gradients: str = "g", replays: int = 0, red: bool | None = None) -> Evidence:
    """One step of four micro-steps, with the work that it did; `red` is what the tripwire said."""
    build = dict.fromkeys(("weights", "frozen", "seed"), 0)
    build |= {"elements": {"p": 100}, "data": {"content_hash": "d"}, "enabled": ["own"], "changed": True}
    run = {"loss": [1.0], "gradients": [gradients], "state": ["s"], "rng": ["r"], "lr": [0.1], "batch": ["b"], "still": []}
    run |= {"supervised": [7], "replays": [replays]}
    wire = None if red is None else {"red": red, "detail": "nothing happened"}
    update = {"problems": [], "error": 0.0, "limit": 1.0, "name": "p"}
    return Evidence(build, run, update=update, work=counts, tripwire=wire)


def failing(candidate: Evidence, wanted: tuple[str, ...] = ("own",)) -> list[tuple[str, str]]:
    checks = preflight(arm(SAME), None, candidate, wanted, {})
    return [(check.name, check.detail) for check in checks if not check.passed]


@pytest.mark.parametrize("more", [{}, {"own": 5}, {"mm": 6}], ids=["the same", "some of its own", "more of it"])
def test_the_reference_s_bits_by_all_of_the_reference_s_work_prove_nothing(more):
    """Whoever computes everything twice, or nothing of its own, can't be told from the reference."""
    counts = SAME | {"operators": SAME["operators"] | more}
    assert failing(arm(counts, red=True)) == [("the candidate did work of its own", NO_WORK)]
    assert failing(arm(counts), wanted=()) == []  # nobody said that it was another way


@pytest.mark.parametrize("kind", LESS)
@pytest.mark.parametrize("left", [True, False], ids=["less", "none"])
def test_any_work_no_longer_done_is_proof(kind, left):
    counts = {name: dict(own) for name, own in SAME.items()}
    counts[kind] = {LESS[kind]: counts[kind][LESS[kind]] - 1} if left else {}
    assert failing(arm(counts, red=True)) == []


def test_other_bits_and_replays_are_proof():
    assert failing(arm(SAME, gradients="others", red=True)) == failing(arm(SAME, replays=4, red=True)) == []


@pytest.mark.parametrize(
    ("replays", "broken"),
    [
        ([0, 8, 8, 8], []),  # graphs of layers, which the first step captures
        ([4, 4, 4, 4], []),
        ([4, 4, 0, 4], [("every step replays as many graphs", "0 to 4 in the second half")]),
        ([4, 4, 4, 3], [("every step replays as many graphs", "3 to 4 in the second half")]),
        ([4, 0, 0, 0], [("the candidate did work of its own", NO_WORK)]),  # given up
    ],
)
def test_replays_settle(replays, broken):
    candidate = arm(SAME, red=True)
    candidate.free_run["replays"] = replays
    assert failing(candidate) == broken


def test_a_tripwire_that_is_not_red_speaks_against_whatever_else_was_proved():
    assert failing(arm(SAME, gradients="others", red=False)) == [("the tripwire turns the gate red", "nothing happened")]


def counted(apply) -> tuple[dict, dict[str, torch.Tensor]]:
    """The census of a micro-step after `apply`, and its gradients."""
    run, _ = tiny("qwen3-tiny")
    apply(run)
    (batch,) = two_probes(run)[1]
    found = gradients(run, batch)
    return work(lambda: accumulate(run, [batch], batch.supervised_tokens), cuda=False), found


def test_a_real_optimization_does_less_and_a_cheat_does_not(one_thread):
    """Both have the reference's bits; the cheat has the reference compute them, after it computed in vain."""

    def static_lora(run: Run) -> None:
        registry.discover()["static_lora"].apply(run)

    reference, bits = counted(lambda run: None)
    for apply, honest in ((static_lora, True), (find("returns_reference:all:1").apply, False)):
        counts, own = counted(apply)
        assert all(torch.equal(own[name], bits[name]) for name in bits)
        assert bool(changes(reference, counts).gone) == honest
        assert (sum(counts["operators"].values()) > sum(reference["operators"].values())) != honest
