"""Arms that are timed in turn: as many blocks as a narrow interval needs, within bounds."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from abtest.arm import ArmFailed
from bench.clock import TimingConfig, race, time_arms, time_equals, time_round_robin
from bench.records import Race


class TimedArm:
    """Answers as an arm's process does: blocks take `seconds`, over and over. log: who was asked, in order."""

    def __init__(
        self, name: str, seconds, log: list[str] | None = None, fails_at: int | None = None, update: float = 1.0
    ) -> None:
        self.update = update
        self.spec, self.built = SimpleNamespace(name=name), {"flops": 2.0}
        self.seconds, self.log, self.fails_at, self.blocks = itertools.cycle(seconds), log, fails_at, 0
        self.others: list[str] = []

    def call(self, command: str, **arguments):
        if command == "time_update":
            if self.log is not None:
                self.log.append(f"{self.spec.name} updates")
            return {"seconds": self.update}
        if command != "time_block":
            self.others.append(command)
        if command in ("give_back", "prepare_updates", "finish_updates"):
            return {}
        if command == "prepare_timing":
            return {"positions": 512, "real_tokens": 500, "supervised_tokens": 200}
        if command == "finish_timing":
            return {"peak_memory_bytes": 1 << 20, "launches": 7}
        self.blocks += 1
        if self.blocks == self.fails_at:
            raise ArmFailed("it ended")
        if self.log is not None:
            self.log.append(self.spec.name)
        return {"seconds": next(self.seconds)}


def silent(*progress) -> None:
    """Progress that nobody watches."""


def noisy(scale: float):
    return np.random.default_rng(3).uniform(1, 1 + scale, 97)


def test_a_quiet_host_needs_no_more_blocks_than_are_asked_for():
    log: list[str] = []
    arms = TimedArm("stock", [2.0], log), TimedArm("arm", [1.0], log)
    perf = time_arms(*arms, TimingConfig(4, 2, 1, 40), 1e3, silent, updates=False)
    assert perf.blocks == 4 and log == ["stock", "arm", "arm", "stock"] * 2  # by turns, and who begins by turns
    assert (perf.ratio, perf.ratio_low, perf.ratio_high) == (2.0, 2.0, 2.0)
    assert perf.real_tokens_per_s == 500 and perf.micro_step_ms == 500 and perf.mfu == pytest.approx(512 * 2 / 1e3)


def test_who_waits_for_the_next_gives_back_what_it_worked_in():
    stock, arm = (TimedArm(name, [1.0]) for name in ("stock", "arm"))
    time_arms(stock, arm, TimingConfig(2, 1), 1e3, silent)
    updates = ["prepare_updates", "finish_updates"]
    assert stock.others == ["prepare_timing", "give_back", *updates]
    assert arm.others == ["prepare_timing", "finish_timing", *updates], "peak memory is that of micro-steps"


def test_updates_are_timed_in_turn():
    log: list[str] = []
    stock, arm = TimedArm("stock", [2.0], log, update=0.006), TimedArm("arm", [1.0], log, update=0.002)
    perf = time_arms(stock, arm, TimingConfig(2, 1), 1e3, silent)
    assert log[4:] == ["stock updates", "arm updates", "arm updates", "stock updates"] * 3
    assert perf.update_ms == 2.0 and perf.ratio == 2.0 and perf.update_in_step
    assert (perf.update_ratio, perf.update_ratio_low, perf.update_ratio_high) == pytest.approx((3, 3, 3))


def test_updates_of_equal_arms_and_of_none():
    first, again = time_equals(
        TimedArm("stock", [1.0], update=0.006), TimedArm("again", [1.0], update=0.005), TimingConfig(2, 1), 1e3, silent
    )
    assert (first.update_ms, first.update_ratio, again.update_ms, again.update_ratio) == pytest.approx((6, 1, 5, 1.2))
    peer = TimedArm("peer", [1.0])
    assert time_arms(TimedArm("stock", [1.0]), peer, TimingConfig(2, 1), 1e3, silent, updates=False).update_ms is None
    assert "prepare_updates" not in peer.others


@pytest.mark.parametrize("first", [True, False])
def test_an_arm_may_get_ready_before_the_reference_takes_its_memory(first):
    asked: list[str] = []
    arms = [TimedArm(name, [1.0]) for name in ("stock", "a", "b")]
    for arm in arms:
        own = arm.call
        arm.call = lambda command, own=own, arm=arm, **given: asked.append((command, arm.spec.name)) or own(command, **given)
    time_round_robin(arms[0], arms[1:], TimingConfig(2, 1), 2, lambda ratios: True, silent, reference_first=first)
    ready = [name for command, name in asked if command == "prepare_timing"]
    assert ready == (["stock", "a", "b"] if first else ["a", "b", "stock"])


def test_of_several_everybody_is_first_and_has_other_neighbours():
    log: list[str] = []
    arms = [TimedArm(name, [1.0], log) for name in "abcd"]
    time_round_robin(arms[0], arms[1:], TimingConfig(4, 1), 4, lambda ratios: True, silent)
    assert ["".join(log[i : i + 4]) for i in range(0, 16, 4)] == ["abcd", "badc", "cdab", "dcba"]


@pytest.mark.parametrize(("most", "width", "blocks"), [(0, 0.03, 4), (10, 0.03, 10), (1000, 1.0, 4)])
def test_a_busy_host_gets_more_up_to_a_limit(most, width, blocks):
    arms = TimedArm("stock", noisy(2.0)), TimedArm("arm", noisy(1.0)[::-1])
    assert time_arms(*arms, TimingConfig(4, 1, 1, most, width), 1e3, silent).blocks == blocks


def test_more_blocks_make_the_interval_narrow():
    arms = TimedArm("stock", noisy(0.3)), TimedArm("arm", noisy(0.2)[::-1])
    few = time_arms(*arms, TimingConfig(4, 1), 1e3, silent)
    many = time_arms(*arms, TimingConfig(4, 1, 1, 4096, 0.03), 1e3, silent)
    assert few.ratio_high - few.ratio_low > 0.03 * few.ratio
    assert many.ratio_high - many.ratio_low <= 0.03 * many.ratio and 4 < many.blocks < 4096


def test_equal_arms_share_their_blocks():
    first, again = time_equals(
        TimedArm("stock", noisy(2.0)), TimedArm("again", noisy(1.0)), TimingConfig(4, 1, 1, 9), 1e3, silent
    )
    assert first.blocks == again.blocks == 9 and first.ratio == first.ratio_low == first.ratio_high == 1


def test_a_race_is_the_peer_s_time_over_the_other_s():
    log: list[str] = []
    best = SimpleNamespace(arm="combination", optimizations=("a", "b"))
    found = race(TimedArm("peer", [3.0], log), TimedArm("again", [2.0], log), best, TimingConfig(4, 2, 1, 40))
    assert found == Race("combination", ("a", "b"), 1.5, 1.5, 1.5, 3 * 4, peer_ms=1500.0, own_ms=1000.0)
    assert log == ["peer", "again", "again", "peer"] * 2 * 3, "three times as many blocks as beside stock"


def test_an_arm_that_ends_is_said_so():
    with pytest.raises(ArmFailed, match="it ended"):
        time_arms(TimedArm("stock", [1.0]), TimedArm("arm", [1.0], fails_at=3), TimingConfig(4, 1), 1e3, silent)
