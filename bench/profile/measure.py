"""Measures one run: walls without the profiler, the same work under it, memory by owner, host stacks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.profiler import record_function

from abtest.census import counted_replays
from abtest.free_run import step_batches
from bench.profile import memory, phases
from bench.profile.owners import Owners
from bench.profile.stacks import sample
from bench.profile.trace import Trace, capture
from loop.config import Config
from loop.data import Dataset
from loop.errors import UserError
from loop.rows import positions_of
from loop.run import Run
from loop.training import NonFiniteLoss, build, train_step

MICRO_STEP, STEP = "micro_step", "step"
MARK, WARM_UP, PLAIN = "isoloss: ", "isoloss warm-up", "isoloss without graphs"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """steps: repetitions that are timed, of each phase; traced: under the profiler; micro_batches: micro-steps in one
    repetition of their phase; warmup: repetitions before anything counts; stack_seconds: of py-spy, 0 for none."""

    steps: int
    traced: int
    micro_batches: int
    warmup: int
    stack_seconds: float


@dataclass(frozen=True)
class Phase:
    """work: what is timed, and what `per` micro-steps, updates or steps share. prepare: before it; clear: after it."""

    name: str
    work: Callable[[], object]
    per: int
    prepare: Callable[[], object]
    clear: Callable[[], object]


def phases_of(run: Run, dataset: Dataset, micro_batches: int) -> tuple[Phase, ...]:
    """The micro-step: forward and backward of several micro-batches in a row, already on the device, as `bench.run` times
    them. The update. And the whole optimizer step as the loop takes it, from fetching its batches to reading the norm."""
    batches = [step_batches(run, dataset, step)[0].to(run.device) for step in range(micro_batches)]
    clear = run.optimizer.zero_grad

    def micro_steps() -> None:
        for batch in batches:
            run.micro_step(run, batch, batch.supervised_tokens)

    def gradients() -> None:
        run.micro_step(run, batches[0], batches[0].supervised_tokens)

    def nothing() -> None:
        pass

    return (
        Phase(MICRO_STEP, micro_steps, len(batches), nothing, clear),
        Phase(phases.UPDATE, lambda: float(run.optimizer.step(0)[1]), 1, gradients, nothing),
        Phase(STEP, lambda: train_step(run, dataset, 0), 1, nothing, nothing),  # the same batches, so nothing is new to it
    )


def profile(config: Config, names: tuple[str, ...], effort: Effort, say: Say) -> dict[str, Any]:
    """Everything about a run of `config` with `names` switched on, as JSON values. Times in seconds, memory in bytes.

    Raises UserError for a configuration, data or optimizations that can't be, and where the loss stops being a number.
    """
    say("building the run")
    run, dataset = build(config, names)
    for name, reason in run.refused.items():
        say(f"not enabled: {name}: {reason}")
    try:
        return _measure(run, dataset, effort, say)
    except NonFiniteLoss as error:
        raise UserError(f"nothing can be profiled: {error}") from error


def _measure(run: Run, dataset: Dataset, effort: Effort, say: Say) -> dict[str, Any]:
    found = phases_of(run, dataset, effort.micro_batches)
    batch = step_batches(run, dataset, 0)[0].to(run.device)
    say(f"warming up: {effort.warmup} of each phase")
    with counted_replays() as replays:
        for phase in found:
            for _ in range(effort.warmup):
                _once(run, phase)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    say(f"timing: {effort.steps} of each phase, without the profiler")
    walls = {phase.name: [_once(run, phase) / phase.per for _ in range(effort.steps)] for phase in found}
    peaks = memory.peaks(run.device)
    say("counting memory by owner")
    owned = memory.by_owner(run, batch)
    run.optimizer.zero_grad()
    say(f"sampling host stacks for {effort.stack_seconds:g} s")
    stacks = sample(lambda: train_step(run, dataset, 0), effort.stack_seconds)
    # Last, and all phases in one session: graphs and a second session of the device's tracer do not get on.
    say(f"tracing: {effort.traced} of each phase")
    trace = _trace(run, found, effort.traced, graphs=replays[0] > 0)
    results = {name: _walls(walls[name]) | traced for name, traced in _traced(run, found, trace).items()}
    peaks = memory.with_graphs(peaks, run.device)  # only now: whatever runs after it has to allocate anew
    return {
        "enabled": list(run.enabled), "refused": dict(run.refused), "data": _data(run, dataset, batch),
        "phases": results, "memory": owned | peaks, "stacks": stacks,
    }  # fmt: skip


def _data(run: Run, dataset: Dataset, batch) -> dict[str, Any]:
    """Of one micro-step; the shares are the data set's."""
    return {
        "positions": positions_of(run, batch), "real_tokens": batch.real_tokens,
        "supervised_tokens": batch.supervised_tokens, "micro_steps_per_step": run.config.grad_accum,
        "content_hash": dataset.content_hash,
    }  # fmt: skip


def _synchronize(run: Run) -> None:
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)


def _once(run: Run, phase: Phase) -> float:
    """Seconds of one repetition."""
    phase.prepare()
    _synchronize(run)
    began = time.perf_counter()
    phase.work()
    _synchronize(run)
    seconds = time.perf_counter() - began
    phase.clear()
    return seconds


def _walls(seconds: list[float]) -> dict[str, float]:
    """The median, and the fastest and slowest repetition."""
    return {"wall_s": statistics.median(seconds), "wall_low_s": min(seconds), "wall_high_s": max(seconds)}


def _trace(run: Run, found: tuple[Phase, ...], times: int, graphs: bool) -> Trace:
    """One repetition that is not marked, since the profiler's first is slow, then `times` of each phase that are. With
    graphs, besides, one of micro-steps that step aside from theirs, because a hook watches all modules."""

    def marked(phase: Phase, mark: str) -> None:
        phase.prepare()
        _synchronize(run)
        with record_function(mark):
            phase.work()
            _synchronize(run)
        phase.clear()

    def repetitions() -> None:
        marked(found[0], WARM_UP)
        for phase in found:
            for _ in range(times):
                marked(phase, MARK + phase.name)
        if graphs:
            handle = register_module_forward_hook(lambda module, arguments, output: None)
            try:
                marked(found[0], PLAIN)
            finally:
                handle.remove()

    return capture(repetitions, run.device.type == "cuda")


def _traced(run: Run, found: tuple[Phase, ...], trace: Trace) -> dict[str, dict[str, Any]]:
    """By phase, what the trace says of it."""
    summed = phases.of_device if run.device.type == "cuda" else phases.of_host
    owners = Owners(run.enabled)
    for plain in trace.ranges(PLAIN):
        owners.learn(plain)
    results = {}
    for phase in found:
        ranges = list(trace.ranges(MARK + phase.name))
        wall = sum(one.marks[0].seconds for one in ranges) / (len(ranges) * phase.per)
        results[phase.name] = {"traced_wall_s": wall} | summed(ranges, phase.name, owners, phase.per)
    return results
