"""The micro-step that replays graphs, captures the ones it lacks, and runs plainly where there can be none."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from loop.batch import PackedBatch
from loop.model import plain_micro_step

from .gradients import Accumulators, Held, deferred
from .inputs import ROWS, CannotCapture, Inputs, signature, with_padded_rows
from .recorder import RandomState
from .watch import Baked, Onlookers, watcher

if TYPE_CHECKING:
    from loop.run import Run

MOST_GRAPHS = 32  # the one that was used longest ago makes room
PATIENCE = 48  # captures after which there must have been more replays of known graphs than captures
WARM_UPS = 2  # before a run's first capture; one before any other
REPLAYS, CAPTURES, PLAIN = "replays", "captures", "plain: "  # what is counted; PLAIN goes before the reason

log = logging.getLogger(__name__)


class Graph(Protocol):
    def replay(self) -> None: ...


class Recorder(Protocol):
    def warm(self, work: Callable[[], None]) -> None: ...
    def record(self, work: Callable[[], None]) -> Graph: ...
    def crowded(self) -> bool: ...
    def release(self) -> None: ...


@dataclass(frozen=True)
class Captured:
    """A graph, what it reads, and which masters have a gradient after it."""

    graph: Graph
    inputs: Inputs
    given: Held


class GraphedMicroStep:
    """Stands where `plain_micro_step` stood. Every micro-step is one replay, or plain for a reason that `counts` has.

    Graphs belong to one run as it is: whatever of its model, loss head or optimizer becomes another object drops them.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.counts: Counter[str] = Counter()
        self.baked: Baked | None = None
        self.onlookers: Onlookers | None = None
        self._forget()

    def _forget(self) -> None:
        self.graphs: OrderedDict[tuple, Captured] = OrderedDict()
        self.obstacles: dict[tuple, str] = {}  # signature -> why it can't be captured
        self.asked: frozenset[str] = frozenset()
        self.gradients: Accumulators | None = None
        self.loss: torch.Tensor | None = None

    def __call__(self, run: Run, batch: PackedBatch, step_supervised_tokens: int) -> torch.Tensor:
        """Forward and backward of one micro-batch; returns the detached fp32 loss sum, a tensor of its own."""
        reason = watcher() or self._follow(run) or _one_document_a_row(batch)
        if reason is None:
            try:
                captured = self._graph_for(run, batch, step_supervised_tokens)
            except CannotCapture as obstacle:
                reason = str(obstacle)
        if reason is not None:
            return self._plain(reason, run, batch, step_supervised_tokens)
        captured.inputs.fill(batch, step_supervised_tokens)
        captured.graph.replay()
        self.gradients.publish(captured.given)
        self.counts[REPLAYS] += 1
        return self.loss.clone()

    def _plain(self, reason: str, run: Run, batch: PackedBatch, step_supervised_tokens: int) -> torch.Tensor:
        if not self.counts[PLAIN + reason]:
            log.warning("cuda_graphs: a micro-step runs without a graph: %s", reason)
        self.counts[PLAIN + reason] += 1
        if self.graphs and self.recorder.crowded():
            self.graphs.clear()
            self.recorder.release()
        batch = with_padded_rows(batch) if ROWS in self.asked else batch
        return plain_micro_step(run, batch, step_supervised_tokens)

    def _follow(self, run: Run) -> str | None:
        """Starts over where the run is not what was captured. Says so where somebody began to watch a module."""
        if self.onlookers is None:
            self.onlookers = Onlookers(run.model)
        if self.onlookers.new(run.model):
            return "hooks watch a module"
        if self.baked is None or not self.baked.holds(run):
            self._forget()
            self.baked = Baked(run)
            self.gradients = Accumulators(run.optimizer.masters)
            self.loss = torch.empty((), dtype=torch.float32, device=run.device)
        return None

    def _graph_for(self, run: Run, batch: PackedBatch, step_supervised_tokens: int) -> Captured:
        """The graph of this batch, captured now if need be. Raises CannotCapture."""
        self.gradients.settle()
        held = self.gradients.held()
        key = (*signature(batch, self.asked), held)
        if key in self.graphs:
            self.graphs.move_to_end(key)
            return self.graphs[key]
        if key in self.obstacles:
            raise CannotCapture(self.obstacles[key])
        known = self.counts[REPLAYS] - self.counts[CAPTURES]
        if self.counts[CAPTURES] >= PATIENCE and known < self.counts[CAPTURES]:
            raise CannotCapture("packs repeat too rarely for graphs to pay")
        try:
            captured = self._capture(run, batch, step_supervised_tokens, held)
        except torch.OutOfMemoryError as error:  # others may give theirs back: the next such pack tries again
            raise CannotCapture("no memory for a graph") from error
        except (CannotCapture, RuntimeError) as error:
            self.obstacles[key] = str(error).splitlines()[0]
            raise CannotCapture(self.obstacles[key]) from error
        self._keep(captured, batch, held)
        return captured

    def _keep(self, captured: Captured, batch: PackedBatch, held: Held) -> None:
        """Files a graph; where it asked for more than those before it, they go: their signatures say too little."""
        if not captured.inputs.asked <= self.asked:
            self.asked = self.asked | captured.inputs.asked
            self.graphs.clear()
        self.graphs[(*signature(batch, self.asked), held)] = captured
        self.counts[CAPTURES] += 1
        while len(self.graphs) > MOST_GRAPHS:
            self.graphs.popitem(last=False)

    def _capture(self, run: Run, batch: PackedBatch, step_supervised_tokens: int, held: Held) -> Captured:
        """Warms up, captures, and leaves gradients and random numbers as they were."""
        gradients, random = self.gradients, RandomState(run.device)
        before, inputs = gradients.copies(held), Inputs(batch)
        inputs.fill(batch, step_supervised_tokens)
        given: list[Held] = []

        def work() -> None:
            loss = forward_backward(run, inputs)
            gradients.store(waiting)
            given.append(gradients.held())
            self.loss.copy_(loss)

        try:
            with deferred(run.optimizer, gradients.buffers) as waiting:
                for _ in range(1 if self.counts[CAPTURES] else WARM_UPS):
                    gradients.start(held)
                    self.recorder.warm(lambda: forward_backward(run, inputs))
                    gradients.allocate(waiting)
                    gradients.store(waiting)
                gradients.start(held)
                graph = self.recorder.record(work)
        finally:
            gradients.restore(held, before)
            random.restore()
        return Captured(graph, inputs, given[-1])


def forward_backward(run: Run, inputs: Inputs) -> torch.Tensor:
    """The loop's `plain_micro_step` on static tensors: the gradient that its division sends back is given as a tensor."""
    batch = inputs.batch()
    body = run.model.get_decoder()
    out = body(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, pack=inputs.pack())
    loss_sum = run.loss_head(run.model, out.last_hidden_state, batch)
    loss_sum.backward(inputs.scale)
    return loss_sum.detach()


def _one_document_a_row(batch: PackedBatch) -> str | None:
    """transformers leaves the mask out for such a batch, but looks for it only where no graph is captured."""
    return "every row is one document" if len(batch.lengths) == len(batch.input_ids) else None
