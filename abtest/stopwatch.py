"""Timing one arm: micro-steps, updates, memory, launches. The clock on the other side takes arms in turn."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

import torch

from abtest.census import count_launches
from abtest.free_run import step_batches
from loop import attention
from loop.data import Dataset
from loop.rows import positions_of
from loop.run import Run


class Stopwatch:
    """The timing commands of a worker, which holds `run` and `dataset`."""

    run: Run
    dataset: Dataset
    loaded: str | None  # the state whose weights the run has

    def prepare_timing(self, micro_batches: int, warmup: int) -> dict:
        """Puts the micro-batches on the device and warms up; peak memory counts from here.

        An arm with the reference's attention is timed with transformers' plain SDPA, because that is what a user gets. An
        arm with its own attention keeps it.
        """
        if self.run.model.config._attn_implementation == attention.NAME:
            self.run.model.set_attn_implementation(attention.PLAIN)
        steps = [step_batches(self.run, self.dataset, step)[:1] for step in range(micro_batches)]
        self.batches = [batch.to(self.run.device) for batches in steps for batch in batches]
        for _ in range(warmup):
            self._block()
        if self.run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.run.device)
        totals = {name: sum(getattr(b, name) for b in self.batches) for name in ("real_tokens", "supervised_tokens")}
        return totals | {"positions": sum(positions_of(self.run, batch) for batch in self.batches)}

    def _block(self) -> float:
        seconds = self._seconds(self._micro_steps)
        self.run.optimizer.zero_grad()
        return seconds

    def _micro_steps(self) -> None:
        for batch in self.batches:
            self.run.micro_step(self.run, batch, batch.supervised_tokens)

    def _seconds(self, work: Callable[[], object]) -> float:
        """What `work` takes, the device's share of it included."""
        self._synchronize()
        began = time.perf_counter()
        work()
        self._synchronize()
        return time.perf_counter() - began

    def _synchronize(self) -> None:
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)

    def time_block(self) -> dict:
        """Seconds for one pass, forward and backward, over the prepared micro-batches."""
        return {"seconds": self._block()}

    def finish_timing(self) -> dict:
        """Peak memory (device memory on CUDA, resident memory of the process on a CPU) and launches a micro-step."""
        if self.run.device.type == "cuda":
            peak = max(torch.cuda.max_memory_allocated(self.run.device), staying_memory(self.run.device))
            launches, names = count_launches(lambda: self.run.micro_step(self.run, self.batches[0], 1))
            self.run.optimizer.zero_grad()
            torch.cuda.empty_cache()  # an arm that was timed waits; others on its GPU are still to be gated
        else:
            peak, launches, names = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, None, {}
        return {"peak_memory_bytes": peak, "launches": launches, "kernels": names}

    def prepare_updates(self) -> dict:
        """Makes one update for warming up."""
        self.time_update()
        return {}

    def time_update(self) -> dict:
        """Seconds that an update of the weights adds to the micro-step before it: clipping, AdamW, and rounding the masters
        into what computes.

        On a GPU from the end of the micro-step's work there to the end of the update's. Where the host is ahead of the
        device, as with graphs, it prepares the update meanwhile, and only what the device does is added; where it is not,
        what the host takes is added, too. At the rate of the first step, which is the warm-up's least; the weights are no
        longer those of a state.
        """
        self.loaded = None
        self.run.optimizer.zero_grad()
        self.run.micro_step(self.run, self.batches[0], self.batches[0].supervised_tokens)
        return {"seconds": self._seconds_behind(lambda: self.run.optimizer.step(0))}

    def _seconds_behind(self, work: Callable[[], object]) -> float:
        """What `work` takes behind what the device still has to do; on a CPU that is nothing."""
        if self.run.device.type != "cuda":
            return self._seconds(work)
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        work()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1000

    def finish_updates(self) -> dict:
        """Gives back what only the updates needed."""
        if self.run.device.type == "cuda":
            torch.cuda.empty_cache()
        return {}


def staying_memory(device: torch.device) -> int:
    """Bytes of a CUDA device that stay with this process between micro-steps: what is alive, and the pools of its graphs.

    A replay allocates nothing, and what it works in was freed when its capture had ended, so to the allocator's peak a graph
    takes no memory; yet nobody else gets its pool. What is cached and no graph's is given back first.
    """
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)
