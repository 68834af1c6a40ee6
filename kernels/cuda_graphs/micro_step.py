"""The micro-step that replays graphs, captures the ones it lacks, and runs plainly where there can be none."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from loop.batch import PackedBatch
from loop.delta_net import Pack
from loop.model import forward_body, plain_micro_step
from loop.random_state import RandomState

from .gradients import Accumulators, Held, Late, deferred
from .inputs import ROWS, CannotCapture, Inputs, signature, with_padded_rows
from .watch import Baked, Onlookers, watcher

if TYPE_CHECKING:
    from loop.run import Run

MOST_GRAPHS = 32  # the one that was used longest ago makes room
PATIENCE = 48  # captures after which there must have been more replays of known graphs than captures
LONGEST_PAUSE = 64  # micro-steps between two tries, at most, where memory is short: each costs two micro-steps
WARM_UPS = 2  # before a run's first capture; one before any other
NO_MEMORY = "no memory for a graph"
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
class Seam:
    """What lies between two graphs, where the loss head runs without one. hidden [B, L, D]: what the first leaves, and
    d_hidden: the gradient that `backward`, the second, begins with."""

    hidden: torch.Tensor
    d_hidden: torch.Tensor
    backward: Graph


@dataclass(frozen=True)
class Captured:
    """A graph of the whole micro-step, or of its forward where there is a seam; what it reads, and which masters have a
    gradient in the end."""

    graph: Graph
    inputs: Inputs
    given: Held
    seam: Seam | None = None


class GraphedMicroStep:
    """Stands where `plain_micro_step` stood. Every micro-step is one replay, or plain for a reason that `counts` has.

    With a frozen head a replay is two graphs, and between them the loss head runs as in the loop, on as many rows as there
    are: it is few launches, which the host makes while the device is at the first graph, and its rows need no graphs of
    their own. A head that trains may share its weight with the embeddings, whose gradients autograd adds to each other
    before anybody sees them: there everything is one graph.

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
        self.pause = self.pausing = 0  # micro-steps until a capture is tried again, behind the last failure and from now
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
        loss = self.loss.clone() if captured.seam is None else self._cross(run, batch, captured.inputs, captured.seam)
        self.gradients.publish(captured.given)
        self.counts[REPLAYS] += 1
        return loss

    def _cross(self, run: Run, batch: PackedBatch, inputs: Inputs, seam: Seam) -> torch.Tensor:
        """The loss head, then the second graph. Returns the detached loss sum."""
        with deferred(run.optimizer, self.gradients.buffers) as waiting:
            loss = head_backward(run, seam.hidden, batch, inputs.scale, seam.d_hidden)
            self.gradients.store(waiting)
        seam.backward.replay()
        return loss

    def _plain(self, reason: str, run: Run, batch: PackedBatch, step_supervised_tokens: int) -> torch.Tensor:
        if not self.counts[PLAIN + reason]:
            log.warning("cuda_graphs: a micro-step runs without a graph: %s", reason)
        self.counts[PLAIN + reason] += 1
        if self.graphs and self.recorder.crowded():
            self.graphs.clear()
            self.recorder.release()
        if ROWS not in self.asked:
            return plain_micro_step(run, batch, step_supervised_tokens)
        padded = with_padded_rows(batch)
        if _head_trains(run):
            return plain_micro_step(run, padded, step_supervised_tokens)
        return plain_micro_step(run, batch, step_supervised_tokens, Pack.of(padded))

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
        if self.pausing:
            self.pausing -= 1
            raise CannotCapture(NO_MEMORY)
        try:
            captured = self._capture(run, batch, step_supervised_tokens, held)
        except torch.OutOfMemoryError as error:  # others may give theirs back
            self.pausing, self.pause = self.pause, min(max(2 * self.pause, 1), LONGEST_PAUSE)
            raise CannotCapture(NO_MEMORY) from error
        except (CannotCapture, RuntimeError) as error:
            self.obstacles[key] = str(error).splitlines()[0]
            raise CannotCapture(self.obstacles[key]) from error
        self.pause = 0
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
        try:
            with deferred(run.optimizer, gradients.buffers) as waiting:
                if _head_trains(run):
                    return self._whole(run, inputs, held, waiting)
                return self._in_two(run, batch, inputs, held, waiting)
        finally:
            gradients.restore(held, before)
            random.restore()

    @property
    def _warm_ups(self) -> range:
        return range(1 if self.counts[CAPTURES] else WARM_UPS)

    def _whole(self, run: Run, inputs: Inputs, held: Held, waiting: Late) -> Captured:
        """One graph of everything."""
        gradients, given = self.gradients, []

        def work() -> None:
            loss = forward_backward(run, inputs)
            gradients.store(waiting)
            given.append(gradients.held())
            self.loss.copy_(loss)

        for _ in self._warm_ups:
            gradients.start(held)
            self.recorder.warm(lambda: forward_backward(run, inputs))
            gradients.allocate(waiting)
            gradients.store(waiting)
        gradients.start(held)
        return Captured(self.recorder.record(work), inputs, given[-1])

    def _in_two(self, run: Run, batch: PackedBatch, inputs: Inputs, held: Held, waiting: Late) -> Captured:
        """A graph of forward, and one of backward that begins with the gradients that the loss head leaves."""
        gradients, made, given = self.gradients, [], []

        def forward() -> None:
            made[:] = [forward_body(run.model, inputs.batch(), inputs.pack())]

        def rehearse() -> None:
            forward()
            d_hidden = torch.empty_like(made[0])
            head_backward(run, made[0], batch, inputs.scale, d_hidden)
            after_head[:] = [master in waiting or master.grad is not None for master in gradients.masters]
            made[0].backward(d_hidden)

        def backward() -> None:
            made[0].backward(d_hidden)
            gradients.store(waiting)
            given.append(gradients.held())

        after_head: list[bool] = []
        for _ in self._warm_ups:
            gradients.start(held)
            self.recorder.warm(rehearse)
            gradients.allocate(waiting)
            gradients.store(waiting)
        d_hidden = torch.empty_like(made.pop())
        first = self.recorder.record(forward)
        gradients.start(tuple(after_head))
        second = self.recorder.record(backward)
        return Captured(first, inputs, given[-1], Seam(made[0].detach(), d_hidden, second))


def _head_trains(run: Run) -> bool:
    head = run.model.get_output_embeddings()
    return head is None or any(parameter.requires_grad for parameter in head.parameters())


def forward_backward(run: Run, inputs: Inputs) -> torch.Tensor:
    """The loop's `plain_micro_step` on static tensors: the gradient that its division sends back is given as a tensor."""
    batch = inputs.batch()
    loss_sum = run.loss_head(run.model, forward_body(run.model, batch, inputs.pack()), batch)
    loss_sum.backward(inputs.scale)
    return loss_sum.detach()


def head_backward(
    run: Run, hidden: torch.Tensor, batch: PackedBatch, scale: torch.Tensor, d_hidden: torch.Tensor
) -> torch.Tensor:
    """The loss head forward and backward, as in `forward_backward`, from `hidden` on; hidden's gradient goes to d_hidden.
    Returns the detached loss sum."""
    leaf = hidden.detach().requires_grad_()
    loss_sum = run.loss_head(run.model, leaf, batch)
    loss_sum.backward(scale)
    if leaf.grad is None:
        d_hidden.zero_()
    else:
        d_hidden.copy_(leaf.grad)
    return loss_sum.detach()


def _one_document_a_row(batch: PackedBatch) -> str | None:
    """transformers leaves the mask out for such a batch, but looks for it only where no graph is captured."""
    return "every row is one document" if len(batch.lengths) == len(batch.input_ids) else None
