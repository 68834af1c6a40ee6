"""The search on arms whose speed is known: what it finds, what it keeps, what it leaves alone, and when it ends."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable
from itertools import chain, combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abtest.arm import ArmFailed
from bench.clock import TimingConfig
from bench.search import conductor as conducting
from bench.search.arms import SearchArms, all_clear, clear_winner
from bench.search.candidates import Candidate, beginning
from bench.search.conductor import Conductor
from bench.search.strategy import Answer, Search
from bench.search.trials import EXCHANGE, FORWARD, LEAVE_ONE_OUT, Trial, TrialLedger, read
from loop.config import Config
from loop.errors import UserError

FACTS = {
    "command": "python -m bench.search", "environment": {"device_slug": "box", "git_sha": "abc", "git_dirty": False},
    "recipe": {"model": "m"},
}  # fmt: skip
NAMES = ("a", "b", "c", "d", "e")
Seconds = Callable[[frozenset], float]


class World:
    """Processes whose blocks take `seconds(set)`, times lognormal noise. refuse(set): name -> why. fail(set, command): why
    that ends the process, or None. memory(set): peak bytes."""

    def __init__(self, seconds: Seconds, noise: float = 0.0, seed: int = 0) -> None:
        self.seconds, self.noise, self.generator = seconds, noise, np.random.default_rng(seed)
        self.refuse: Callable[[frozenset], dict[str, str]] = lambda on: {}
        self.fail: Callable[[frozenset, str], str | None] = lambda on, command: None
        self.memory: Callable[[frozenset], int] = lambda on: 1000
        self.alive: list[FakeArm] = []
        self.most_alive = 0
        self.started: list[frozenset] = []
        self.blocks: list[str] = []  # of whom, one after another

    def start(self, spec) -> FakeArm:
        self.started.append(frozenset(spec.optimizations))
        self.alive.append(FakeArm(self, spec))
        self.most_alive = max(self.most_alive, len(self.alive))
        return self.alive[-1]


class FakeArm:
    def __init__(self, world: World, spec) -> None:
        self.world, self.spec, self.on = world, spec, frozenset(spec.optimizations)

    def __exit__(self, *error: object) -> None:
        self.world.alive.remove(self)

    def build(self) -> dict:
        self._fail("build")
        self.built = {"refused": self.world.refuse(self.on)}
        return self.built

    def _fail(self, command: str) -> None:
        why = self.world.fail(self.on, command)
        if why is not None:
            raise ArmFailed(why)

    def call(self, command: str, **arguments) -> dict:
        assert self in self.world.alive, "its process has ended"
        self._fail(command)
        if command == "prepare_timing":
            return {"positions": 100, "real_tokens": 90, "supervised_tokens": 50}
        if command == "finish_timing":
            return {"peak_memory_bytes": self.world.memory(self.on), "launches": 10 + len(self.on)}
        self.world.blocks.append(self.spec.name)
        return {"seconds": self.world.seconds(self.on) * math.exp(self.world.noise * self.world.generator.normal())}


def product(gains: dict[str, float], pairs: dict[frozenset, float] | None = None) -> Seconds:
    """One second over the product of the gains of what is on, and of `pairs` that are on together."""

    def seconds(on: frozenset) -> float:
        together = [gain for pair, gain in (pairs or {}).items() if pair <= on]
        return 1 / math.prod([*(gains[name] for name in on), *together])

    return seconds


def conflict_of(pairs: Iterable[str]) -> Callable[[str, str], bool]:
    found = {frozenset(pair) for pair in pairs}
    return lambda one, other: frozenset((one, other)) in found


def search(
    world: World, path: Path, names: Iterable[str] = NAMES, conflicts: Iterable[str] = (), width: int = 3,
    alone: dict[str, float] | None = None, until: float | None = None, said: list[str] | None = None, gpu: bool = True,
    begin: Iterable[str] = (), untimed: Iterable[str] = (),
) -> Answer:  # fmt: skip
    """One command's search. Whatever comes of it, no process is left over."""
    names = list(names)
    alone = alone or {name: 1 / world.seconds(frozenset([name])) for name in names}
    chosen = [Candidate(name, alone[name], name not in untimed) for name in names]
    arms = SearchArms(world.start, Config(), TimingConfig(4, 1, 1), 16, gpu, lambda *progress: None)
    try:
        with arms:
            say = (said if said is not None else []).append
            conductor = Conductor(arms, TrialLedger(path, "r", names, FACTS), say, until)
            return Search(chosen, conflict_of(conflicts), conductor, width, begin).run()
    finally:
        assert world.alive == []


def subsets(names: Iterable[str]) -> list[frozenset]:
    names = list(names)
    return [frozenset(one) for one in chain(*(combinations(names, size) for size in range(len(names) + 1)))]


def fastest(world: World, names: Iterable[str], conflicts: Iterable[str] = ()) -> float:
    """Seconds of the fastest set there is."""
    clash = [frozenset(pair) for pair in conflicts]
    return min(world.seconds(on) for on in subsets(names) if not any(pair <= on for pair in clash))


def trials_of(path: Path, stage: str) -> list[Trial]:
    return [trial for trial in read(path) if trial.stage == stage]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "box.jsonl"


# What it finds


def test_what_pays_is_found_in_batches_and_the_rest_is_left_off(path):
    world = World(product({"a": 2.0, "b": 1.5, "c": 1.2, "d": 0.9, "e": 0.8}))
    answer = search(world, path)
    assert answer.optimizations == ("a", "b", "c") and answer.finished
    first, second, third, *rest = trials_of(path, FORWARD)
    assert [first.optimizations, second.optimizations, third.optimizations] == [("a",), ("b",), ("c",)]
    assert all(trial.round == 1 and trial.against == () for trial in (first, second, third))
    assert first.timing.ratio == pytest.approx(2.0) and first.faster and first.timing.blocks == 4
    assert [trial.round for trial in rest if trial.added == ("e",)] == [3, 4], "only where those before it don't win"
    assert world.most_alive == 4


def test_each_member_s_own_gain_is_measured_in_the_end(path):
    answer = search(World(product({"a": 2.0, "b": 1.5, "c": 1.2, "d": 0.9, "e": 0.8})), path)
    gains = {trial.left_out[0]: trial.gain for trial in answer.left_out}
    assert {name: gain[0] for name, gain in gains.items()} == pytest.approx({"a": 2.0, "b": 1.5, "c": 1.2})
    assert all(low <= gain <= high for gain, low, high in gains.values())
    assert answer.left_out == tuple(trials_of(path, LEAVE_ONE_OUT))


def test_the_best_set_so_far_keeps_its_process_and_is_compared_in_a_fresh_one_at_last(path):
    world = World(product({"a": 2.0, "b": 1.5}))
    search(world, path, ("a", "b"))
    a, b, ab = frozenset("a"), frozenset("b"), frozenset("ab")
    # stock and both alone; both beside a's process; a fresh process of both beside each without the other
    assert world.started == [frozenset(), a, b, ab, ab, b, a]


@given(
    st.lists(st.sampled_from([0.7, 0.85, 0.95, 1.05, 1.15, 1.4, 2.5]), min_size=5, max_size=5),
    st.integers(0, 2**32), st.sets(st.sampled_from(["ab", "cd"])), st.integers(1, 5),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_with_gains_that_multiply_it_finds_the_fastest_set(gains, seed, conflicts, width):
    world = World(product(dict(zip(NAMES, gains, strict=True))), noise=0.003, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        answer = search(world, Path(folder) / "box.jsonl", NAMES, conflicts, width)
    assert answer.finished
    assert world.seconds(frozenset(answer.optimizations)) == pytest.approx(fastest(world, NAMES, conflicts))


@given(
    st.lists(st.floats(0.3, 3.0), min_size=15, max_size=15), st.integers(0, 2**32), st.sets(st.sampled_from(["ab", "bc"]))
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_whatever_sets_do_to_each_other_the_answer_is_not_slower_than_stock(speeds, seed, conflicts):
    table = dict(zip([on for on in subsets("abcd") if on], speeds, strict=True)) | {frozenset(): 1.0}
    noise = 0.003
    world = World(lambda on: 1 / table[on], noise, seed)
    with tempfile.TemporaryDirectory() as folder:
        answer = search(world, Path(folder) / "box.jsonl", "abcd", conflicts)
    chosen = frozenset(answer.optimizations)
    assert answer.finished and world.seconds(chosen) < 1 + 4 * noise
    assert not any(frozenset(pair) <= chosen for pair in conflicts)
    assert all(world.seconds(chosen) < world.seconds(chosen - {name}) * (1 + 4 * noise) for name in chosen)


def test_what_pays_only_beside_another_is_tried_again(path):
    world = World(product({"a": 1.5, "b": 0.9}, {frozenset("ab"): 1.4}))
    assert search(world, path, ("a", "b"), width=1).optimizations == ("a", "b")


def test_what_pays_only_all_together_is_found_at_once(path):
    world = World(product({"a": 0.95, "b": 0.9, "c": 0.98}, {frozenset("ab"): 1.6}))
    assert search(world, path, ("a", "b", "c")).optimizations == ("a", "b")
    taken = trials_of(path, EXCHANGE)[0]
    assert taken.optimizations == ("a", "b", "c") and taken.faster
    assert [trial.left_out for trial in trials_of(path, LEAVE_ONE_OUT) if not trial.needed] == [("c",)]
    assert sorted({trial.round for trial in read(path)}) == [1, 2, 3], "no round without a comparison"


def test_of_two_that_do_the_same_work_one_stays(path):
    world = World(lambda on: 1.0 if not on & {"a", "b"} else 0.5)
    answer = search(world, path, ("a", "b"), alone={"a": 2.0, "b": 2.0})
    assert len(answer.optimizations) == 1
    # found through a set with both: each alone is not missed, and together they are
    both = World(lambda on: {0: 1.0, 1: 0.9, 2: 0.5}[len(on & {"a", "b"})] if "c" in on else 1.0 + 0.1 * len(on))
    assert search(both, path.with_name("other") / "box.jsonl", ("a", "b", "c")).optimizations == ("a", "b", "c")


def test_where_nothing_pays_the_answer_is_stock(path):
    answer = search(World(product(dict.fromkeys(NAMES, 0.9))), path)
    assert answer == Answer((), True) and trials_of(path, LEAVE_ONE_OUT) == []


def test_a_winner_that_was_only_lucky_is_dropped_in_a_fresh_process(path):
    lucky = World(product({"a": 1.0}))
    blocks = lucky.seconds

    def seconds(on: frozenset) -> float:
        return blocks(on) * (0.9 if on and lucky.started.count(on) == 1 else 1.0)  # its first process is a fast one

    lucky.seconds = seconds
    assert search(lucky, path, ("a",), alone={"a": 1.0}, gpu=False).optimizations == ()
    assert trials_of(path, FORWARD)[0].faster and not trials_of(path, LEAVE_ONE_OUT)[0].needed


@pytest.mark.parametrize(("with_it", "gpu", "stays"), [(900, True, True), (995, True, False), (900, False, False)])
def test_a_member_that_saves_no_time_stays_if_it_saves_device_memory(path, with_it, gpu, stays):
    world = World(product({"a": 2.0, "b": 1.0}, {frozenset("ab"): 1.0}))
    world.memory = lambda on: with_it if "b" in on else 1000
    luck = world.seconds
    world.seconds = lambda on: luck(on) * (0.9 if "b" in on and len(world.started) <= 3 else 1.0)
    answer = search(world, path, ("a", "b"), alone={"a": 2.0, "b": 1.0}, width=1, gpu=gpu)
    tried = [trial for trial in trials_of(path, LEAVE_ONE_OUT) if trial.left_out == ("b",)]
    assert tried and tried[0].gain[0] == pytest.approx(1.0) and tried[0].needed is stays
    assert answer.optimizations == (("a", "b") if stays else ("a",))
    if gpu:
        assert (tried[0].timing.peak_memory_bytes, tried[0].timing.against_peak_memory_bytes) == (1000, with_it)
        assert tried[0].timing.launches == 11
    else:
        assert tried[0].timing.peak_memory_bytes is None and tried[0].timing.launches is None


# Beginning with a set


GAINS = {"a": 2.0, "b": 1.5, "c": 1.2, "d": 0.9, "e": 0.8}


def test_it_begins_with_the_set_that_is_given_adds_what_gains_and_leaves_out_who_is_not_missed(path):
    world = World(product(GAINS))
    answer = search(world, path, begin="ead")
    assert answer.optimizations == ("a", "b", "c") and answer.finished
    assert world.started[0] == frozenset("ade"), "its process is the first"
    first, *rest = read(path)
    assert (first.stage, first.round, first.against, first.added) == (FORWARD, 1, ("a", "d", "e"), ("b",))
    assert [trial.added for trial in rest if trial.faster and trial.stage == FORWARD] == [("c",), ("c",)]
    gone = [trial.left_out for trial in trials_of(path, LEAVE_ONE_OUT) if trial.against == ("a", "b", "c", "d", "e")]
    assert len(gone) == 5 and {trial.left_out[0] for trial in answer.left_out} == {"a", "b", "c"}
    assert not any(on <= {"a"} for on in world.started), "neither stock nor what is far from the set"


@pytest.mark.parametrize("begin", [(), ("a", "b")])
def test_what_works_in_the_update_alone_is_on_from_the_beginning_and_nobody_leaves_it_out(begin, path):
    world = World(product({"a": 1.5, "b": 1.2, "c": 0.9, "u": 1.0}))
    answer = search(world, path, "abcu", begin=begin, untimed="u")
    assert answer.optimizations == ("a", "b", "u") and answer.finished
    assert {trial.left_out for trial in answer.left_out} == {("a",), ("b",)}
    assert all("u" in trial.against and "u" in trial.optimizations for trial in read(path))


def test_it_gives_way_to_what_pays_and_excludes_it(path):
    world = World(product({"a": 1.5, "b": 1.2, "u": 1.0}))
    assert search(world, path, "abu", conflicts=["bu"], untimed="u").optimizations == ("a", "b")
    assert search(World(world.seconds), path.with_name("begun"), "abu", ["bu"], begin="ab", untimed="u").optimizations == (
        "a",
        "b",
    )


def test_it_alone_is_no_answer(path):
    answer = search(World(product({"a": 0.9, "u": 1.0})), path, "au", untimed="u")
    assert answer.optimizations == () and answer.finished


def test_a_set_to_which_nothing_can_be_added_is_measured_member_by_member(path):
    answer = search(World(product({"a": 2.0, "b": 1.5})), path, ("a", "b"), begin=("b", "a"))
    assert answer.optimizations == ("a", "b") and trials_of(path, FORWARD) == trials_of(path, EXCHANGE) == []
    assert {trial.left_out[0]: trial.gain[0] for trial in answer.left_out} == pytest.approx({"a": 2.0, "b": 1.5})


def test_what_keeps_out_a_faster_one_gives_way_although_it_was_given(path):
    answer = search(World(product({"a": 1.2, "b": 1.5, "c": 1.1})), path, ("a", "b", "c"), ["ab"], begin="ac")
    assert answer.optimizations == ("b", "c") and trials_of(path, EXCHANGE)[0].against == ("a", "c")


def test_of_a_set_without_any_gain_stock_is_left(path):
    assert search(World(product(dict.fromkeys("abc", 0.9))), path, "abc", begin="ab") == Answer((), True)


def test_a_set_that_does_not_run_is_named(path):
    world = World(product(GAINS))
    world.fail = lambda on, asked: "no kernel" if on == {"a", "b"} else None
    with pytest.raises(UserError, match=r"^a \+ b, which other sets are to be compared with, does not run: no kernel$"):
        search(world, path, begin="ab")


def test_an_interrupted_search_from_a_set_goes_on_and_comes_to_the_same(tmp_path):
    whole, path = tmp_path / "whole" / "box.jsonl", tmp_path / "box.jsonl"
    expected, answers = search(World(product(GAINS)), whole, begin="ad"), []
    while not answers or not answers[-1].finished:
        world = World(product(GAINS))
        answers.append(search(world, path, alone=GAINS, until=0.0, begin="ad"))  # one batch a command
        assert len(answers) < 20 and set(world.started[:1]) <= {frozenset(read(path)[-1].against)}
    assert answers[-1].optimizations == expected.optimizations and answers[0].optimizations == ("a", "b", "d")
    before, again = path.read_bytes(), World(product(GAINS))
    assert search(again, path, begin="ad") == answers[-1] and again.started == [] and path.read_bytes() == before


def test_searches_from_stock_and_from_a_set_don_t_change_each_other(tmp_path):
    def seconds(on: frozenset) -> float:
        return {0: 1.0, 1: 0.8, 2: 0.9, 3: 0.5}[len(on)] * (0.99 if "c" in on else 1.0)  # only all three go beyond one

    alone, path = {"a": 1.1, "b": 1.1, "c": 1.2}, tmp_path / "box.jsonl"
    stock = search(World(seconds), path, "abc", alone=alone)
    kept = len(read(path))
    world = World(seconds)
    begun = search(world, path, "abc", alone=alone, begin="ab")
    apart = search(World(seconds), tmp_path / "apart" / "box.jsonl", "abc", alone=alone, begin="ab")
    assert begun.optimizations == apart.optimizations and world.started[0] == frozenset("ab")
    assert all(trial.against != () for trial in read(path)[kept:])
    timed = [(trial.stage, trial.against, trial.optimizations) for trial in read(path)]
    assert len(timed) == len(set(timed)), "what both ask for is timed once"
    again = World(seconds)
    assert search(again, path, "abc", alone=alone) == stock and again.started == []


@given(
    st.lists(st.sampled_from([0.7, 0.85, 0.95, 1.05, 1.15, 1.4, 2.5]), min_size=5, max_size=5),
    st.integers(0, 2**32), st.sets(st.sampled_from(["ab", "cd"])), st.sets(st.sampled_from(NAMES)),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_with_gains_that_multiply_it_finds_the_fastest_set_from_anywhere(gains, seed, conflicts, begin):
    begin -= {pair[1] for pair in conflicts if set(pair) <= begin}
    world = World(product(dict(zip(NAMES, gains, strict=True))), noise=0.003, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        answer = search(world, Path(folder) / "box.jsonl", NAMES, conflicts, begin=begin)
    assert answer.finished
    assert world.seconds(frozenset(answer.optimizations)) == pytest.approx(fastest(world, NAMES, conflicts))


def test_a_beginning_is_of_names_or_of_names_joined():
    chosen, conflict = [Candidate(name, 1.0) for name in NAMES], conflict_of(["de"])
    assert beginning(("c", "a+b"), chosen, {}, conflict) == ("a", "b", "c") and beginning((), chosen, {}, conflict) == ()


@pytest.mark.parametrize(
    ("given_names", "words"),
    [
        (("a", "x"), "x: no such optimization; searched are a, b, c, d, e"),
        (("a", ""), ": no such optimization; searched are a, b, c, d, e"),
        (("a+f",), "f: FAILED; only what has passed its gate here, alone or with others, is searched: a, b, c, d, e"),
        (("a", "b+a"), "a: it is there twice"),
        (("e", "a", "d"), "d: d and e exclude one another"),
    ],
)
def test_what_can_t_be_a_beginning(given_names, words):
    with pytest.raises(UserError) as raised:
        beginning(given_names, [Candidate(name, 1.0) for name in NAMES], {"f": "FAILED"}, conflict_of(["de"]))
    assert str(raised.value) == f"--begin {words}"


# Conflicts


def test_of_two_that_conflict_both_are_tried_and_never_together(path):
    world = World(product({"a": 1.2, "b": 1.5, "c": 1.1}))
    assert search(world, path, ("a", "b", "c"), ["ab"]).optimizations == ("b", "c")
    assert frozenset("a") in world.started and frozenset("b") in world.started
    assert not any({"a", "b"} <= on for on in world.started)


def test_what_was_kept_out_takes_the_place_of_a_member_where_it_pays_more(path):
    world = World(product({"a": 1.3, "b": 1.2, "c": 1.5}, {frozenset("bc"): 1.2}))
    answer = search(world, path, ("a", "b", "c"), ["ab"], width=1, alone={"a": 1.6, "b": 1.2, "c": 1.5})
    assert answer.optimizations == ("b", "c")
    taken = [trial for trial in trials_of(path, EXCHANGE) if trial.faster]
    assert [(trial.added, trial.left_out) for trial in taken] == [(("b",), ("a",))]


def test_one_that_keeps_out_two_others_gives_way_to_both(path):
    world = World(product({"a": 1.5, "b": 1.4, "c": 1.4}))
    assert search(world, path, ("a", "b", "c"), ["ab", "ac"]).optimizations == ("b", "c")


# What does not run


def test_what_is_refused_in_a_set_is_skipped_with_its_reason_and_tried_again(path):
    world = World(product({"a": 1.5, "b": 1.4}))
    world.refuse = lambda on: {} if on != {"b"} else {"b": "needs a"}
    said: list[str] = []
    assert search(world, path, ("a", "b"), said=said).optimizations == ("a", "b")
    assert [trial.timing.why for trial in trials_of(path, FORWARD)] == [None, "b: needs a", None]
    assert "  + b: b: needs a" in said
    needed = next(trial for trial in trials_of(path, LEAVE_ONE_OUT) if trial.left_out == ("a",))
    assert needed.needed and needed.gain is None


@pytest.mark.parametrize("command", ["build", "prepare_timing", "time_block"])
def test_a_process_that_ends_does_not_end_the_search(path, command):
    world = World(product({"a": 1.5, "b": 1.4, "c": 1.3}))
    world.fail = lambda on, asked: "the process ended with code 1" if "b" in on and asked == command else None
    assert search(world, path, ("a", "b", "c")).optimizations == ("a", "c")
    whys = {trial.timing.why for trial in read(path) if "b" in trial.optimizations}
    assert whys == {"the process ended with code 1"}


def test_what_finds_too_little_memory_beside_others_is_timed_beside_fewer(path):
    world = World(product({"a": 1.1, "b": 1.5, "c": 1.05, "d": 0.9}))
    running: list[int] = []

    def fail(on: frozenset, asked: str) -> str | None:
        """Three processes find memory; a fourth does not."""
        ready = [arm for arm in world.alive if getattr(arm, "ready", False)]
        running.append(len(ready))
        if asked == "prepare_timing" and len(ready) >= 3 and not any(arm.on == on for arm in ready):
            return "out of memory: 3 GiB"
        for arm in world.alive:
            arm.ready = getattr(arm, "ready", False) or (asked == "prepare_timing" and arm.on == on)
        return None

    world.fail = fail
    assert search(world, path, "abcd", width=4).optimizations == ("a", "b", "c")
    first = [trial for trial in trials_of(path, FORWARD) if trial.round == 1]
    assert {trial.added for trial in first} == {("a",), ("b",), ("c",), ("d",)}
    assert all(trial.timing.why is None for trial in read(path)) and max(running) == 3
    late = world.started[-3:]
    assert len(late) == 3 and world.most_alive == 5, "it tried once, and then knew"


def test_what_needs_too_much_memory_even_alone_is_skipped(path):
    world = World(product({"a": 1.1, "b": 1.5}))
    world.fail = lambda on, asked: "out of memory: 3 GiB" if "b" in on and asked == "prepare_timing" else None
    assert search(world, path, ("a", "b")).optimizations == ("a",)
    assert {trial.timing.why for trial in read(path) if "b" in trial.optimizations} == {"out of memory: 3 GiB"}


def test_where_the_best_set_s_own_process_ends_beside_others_they_are_timed_one_by_one(path):
    world = World(product({"a": 1.1, "b": 1.5}))
    world.fail = lambda on, asked: "out of memory" if not on and asked == "time_block" and len(world.alive) > 2 else None
    assert search(world, path, ("a", "b"), gpu=False).optimizations == ("a", "b")


def test_beside_what_does_not_run_nothing_is_measured(path):
    world = World(product({"a": 1.1}))
    world.fail = lambda on, asked: "no data" if not on and asked == "build" else None
    with pytest.raises(UserError, match=r"^stock, which other sets are to be compared with, does not run: no data$"):
        search(world, path, ("a",))


# Going on, and the end of the time


def test_what_is_recorded_is_not_timed_again(path):
    gains = {"a": 2.0, "b": 1.5, "c": 1.2, "d": 0.9, "e": 0.8}
    answer = search(World(product(gains)), path)
    before, again = path.read_bytes(), World(product(gains))
    assert search(again, path) == answer
    assert again.started == [] and path.read_bytes() == before


def test_an_interrupted_search_goes_on_and_comes_to_the_same(tmp_path):
    gains = {"a": 2.0, "b": 1.5, "c": 1.2, "d": 0.9, "e": 0.8}
    whole, path = tmp_path / "whole" / "box.jsonl", tmp_path / "box.jsonl"
    expected = search(World(product(gains)), whole)
    for _ in range(20):
        world = World(product(gains))
        blocks: Seconds = world.seconds

        def interrupt(on: frozenset, world=world, blocks=blocks) -> float:
            if len(world.started) > 4:
                raise KeyboardInterrupt
            return blocks(on)

        world.seconds = interrupt
        try:
            answer = search(world, path, alone=gains)
            break
        except KeyboardInterrupt:
            continue
    assert answer.optimizations == expected.optimizations and answer.finished
    kept = [[(trial.stage, trial.against, trial.optimizations) for trial in read(one)] for one in (whole, path)]
    assert kept[0] == kept[1]


def test_when_the_time_is_over_it_says_what_is_best_so_far(path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(conducting, "time", SimpleNamespace(monotonic=lambda: now[0]))
    world = World(product({"a": 2.0, "b": 1.5, "c": 1.2, "d": 0.9, "e": 0.8}))
    start = world.start

    def slow(spec):
        now[0] += 10.0
        return start(spec)

    world.start = slow
    answer = search(world, path, until=45.0)  # the first batch of four processes took 40
    assert answer == Answer(("a",), False) and {trial.round for trial in read(path)} == {1}
    answers = [answer]
    while not answers[-1].finished:  # every command gets further
        answers.append(search(world, path, until=0.0))
        assert len(answers) < 20
    assert answers[-1].optimizations == ("a", "b", "c")
    assert [len(answer.optimizations) for answer in answers] == sorted(len(answer.optimizations) for answer in answers)


def test_another_choice_of_candidates_is_another_search(path):
    world = World(product({"a": 2.0, "b": 1.5}))
    search(world, path, ("a",))
    search(world, path, ("a", "b"))
    assert {trial.candidates for trial in read(path)} == {("a",), ("a", "b")}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"environment": FACTS["environment"] | {"git_sha": "def"}}, "commit abc, but now def"),
        ({"environment": FACTS["environment"] | {"git_dirty": True}}, "uncommitted changes False, but now True"),
        ({"recipe": {"model": "other"}}, "model = m, but now other"),
    ],
)
def test_one_run_is_of_one_recipe_and_one_state_of_the_code(path, changed, words):
    search(World(product({"a": 2.0})), path, ("a",))
    with pytest.raises(UserError, match=f"^--run r: searched with {words}; take another --run$"):
        TrialLedger(path, "r", ["a"], FACTS | changed)
    assert TrialLedger(path, "other", ["a"], FACTS | changed).known == {}


# When enough is timed


def test_blocks_are_added_until_the_fastest_is_clear_or_there_are_enough(path):
    search(World(lambda on: 1.0), path, ("a",), alone={"a": 1.0})
    clear, close = path.with_name("clear") / "box.jsonl", path.with_name("close") / "box.jsonl"
    search(World(product({"a": 1.5}), noise=0.01), clear, ("a",))
    search(World(product({"a": 1.02}), noise=0.02, seed=1), close, ("a",))
    assert [trials_of(one, FORWARD)[0].timing.blocks for one in (path, clear, close)] == [16, 4, 8]


def test_everybody_takes_turns(path):
    world = World(product({"a": 0.5, "b": 0.5}))
    search(world, path, ("a", "b"))
    first = world.blocks[:12]
    assert [sorted(first[start : start + 3]) for start in range(0, 12, 3)] == [["trial-1", "trial-2", "trial-3"]] * 4
    assert len({first[start] for start in range(0, 12, 3)}) > 1, "not always the same one first"


@pytest.mark.parametrize(
    ("ratios", "winner", "clear"),
    [
        ([(1.1, 1.05, 1.2), (1.0, 0.9, 1.1)], True, False),
        ([(1.1, 0.99, 1.2), (1.05, 1.01, 1.1)], False, False),
        ([(0.9, 0.8, 0.95), (0.8, 0.7, 0.9)], True, True),
        ([(1.1, 1.05, 1.2), (0.8, 0.7, 0.9)], True, True),
        ([(1.0, 0.9, 1.1)], False, False),
    ],
)
def test_what_is_clear_enough(ratios, winner, clear):
    assert clear_winner(ratios) is winner and all_clear(ratios) is clear
