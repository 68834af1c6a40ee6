"""Check 5: what must hold exactly, whatever rounds. No tolerance here: bits are equal or they are not.

Every function takes a built run whose weights are set, and answers with findings; it leaves no gradient behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from abtest import fingerprint as fp
from abtest.poison import POISONS, poisoned
from abtest.probes import Probe, supervised
from loop.batch import IGNORE, PackedBatch
from loop.model import forward_body
from loop.run import Run
from loop.training import accumulate

REPEATS = 20
TURNS = (1, 5, 3, 1, 1)  # micro-steps with the weights as they are and with others, by turns: no period up to 5 fits in
OTHERS = 1.0625  # what the others are multiplied by


@dataclass(frozen=True)
class Finding:
    """One structural property: whether it held, and what broke it."""

    name: str
    passed: bool
    detail: str = ""


def examine(run: Run, own: Sequence[Probe], repeats: int, on_step: Callable[[int, int], None]) -> list[Finding]:
    """Every structural check. own: at least two probes of different content, the first with several documents, the last
    with several rows."""
    several = [batch for probe in own for batch in probe if len(batch.lengths) > 2]
    packed = min(several, key=lambda batch: batch.positions, default=own[0][0])  # it is run twenty times
    parts = (
        lambda: inputs_unmodified(run, own[0]),
        lambda: follows_inputs(run, own[0], own[1]),
        lambda: follows_weights(run, packed),
        lambda: repeated(run, own[1], repeats),
        lambda: from_poisoned_memory(run, own[1:]),
        lambda: second_backward(run, packed),
        lambda: documents_apart(run, packed),
        lambda: apart_in_a_step(run, own[-1][0]),
    )
    found = []
    for index, part in enumerate(parts):
        found += part()
        run.optimizer.zero_grad()
        on_step(index + 1, len(parts))
    return found


def gradients(run: Run, probe: Probe) -> tuple[str, list[float]]:
    """Fingerprint of the gradients of one probe, and its micro-batches' losses; none are left behind."""
    run.optimizer.zero_grad()
    losses = accumulate(run, list(probe), supervised(probe))
    mark = fp.fingerprint(run.optimizer.gradients())
    run.optimizer.zero_grad()
    return mark, losses


def inputs_unmodified(run: Run, probe: Probe) -> list[Finding]:
    """A micro-step writes to gradients alone: not to its batch, nor to any weight or buffer, nor to the optimizer."""
    batch = probe[0].to(run.device)
    counts = (batch.real_tokens, batch.supervised_tokens, batch.lengths)
    before, random = _held(run, batch), fp.rng_fingerprint(run.device)
    for _ in range(2):  # what the first one left behind, the second may write to
        run.micro_step(run, batch, supervised(probe))
    run.optimizer.zero_grad()
    after = _held(run, batch)
    wrong = [key for key in before | after if before.get(key) != after.get(key)]
    if counts != (batch.real_tokens, batch.supervised_tokens, batch.lengths):
        wrong.append("the batch: its counts")
    stray = [name for name, p in run.model.named_parameters() if not p.requires_grad and p.grad is not None]
    return [
        Finding("inputs unmodified", not wrong, ", ".join(wrong[:3])),
        Finding("no gradient on what does not train", not stray, ", ".join(stray[:3])),
        Finding("a micro-step without dropout draws no random numbers", fp.rng_fingerprint(run.device) == random),
    ]


def _held(run: Run, batch: PackedBatch) -> dict[str, str]:
    """Fingerprints of all that a micro-step is given, looked up anew: a tensor may be exchanged instead of written to."""
    fields = ("input_ids", "labels", "position_ids", "cu_seqlens", "supervised_positions")
    sides = {
        "the batch": {name: getattr(batch, name) for name in fields},
        "the model": dict(run.model.named_parameters()) | dict(run.model.named_buffers()),
        "the optimizer": run.optimizer.state(),
    }
    return fp.fingerprints({f"{side}: {name}": tensor for side, own in sides.items() for name, tensor in own.items()})


def follows_inputs(run: Run, one: Probe, other: Probe) -> list[Finding]:
    """A, B, A again: a replay or a cache that does not follow its inputs shows, and so does one that keeps a state."""
    first, between, again = (gradients(run, probe) for probe in (one, other, one))
    # Each differs in one thing alone: where the supervised count differed too, a stale input would go unseen.
    tokens, labels = (gradients(run, tuple(change(batch) for batch in one)) for change in (_other_tokens, _other_labels))
    back = gradients(run, one)
    joined = gradients(run, tuple(_joined(batch) for batch in other))
    found = [
        Finding("the same batch gives the same gradients after another one", first == again and first == back),
        Finding("other tokens give other gradients", tokens[0] != first[0]),
        Finding("other labels give other gradients", labels[0] != first[0]),
        Finding("other boundaries give other gradients", joined[0] != between[0]),
    ]
    return found


def follows_weights(run: Run, batch: PackedBatch) -> list[Finding]:
    """Weights change in place, as an optimizer's step changes them: a copy that is only renewed now and then shows."""
    weights = {name: parameter.detach().clone() for name, parameter in run.optimizer.parameters.items()}
    marks: tuple[list, list] = [], []
    try:
        for turn, count in enumerate(TURNS):
            _set(run, weights, OTHERS if turn % 2 else 1.0)
            marks[turn % 2].extend(gradients(run, (batch,)) for _ in range(count))
    finally:
        _set(run, weights, 1.0)
    late = [side for side, own in zip(("first", "other"), marks, strict=True) if any(mark != own[0] for mark in own)]
    return [
        Finding("other weights give other gradients", marks[0][0][0] != marks[1][0][0]),
        Finding("gradients follow weights that change", not late, f"late with the {' and '.join(late)}" if late else ""),
    ]


@torch.no_grad()
def _set(run: Run, weights: dict[str, torch.Tensor], factor: float) -> None:
    for name, parameter in run.optimizer.parameters.items():
        parameter.copy_(weights[name] * factor)


def _joined(batch: PackedBatch) -> PackedBatch:
    """The same tokens and labels with every row as one document."""
    rows, length = batch.input_ids.shape
    bounds = torch.arange(rows + 1, dtype=torch.int32) * length
    return replace(batch, position_ids=torch.arange(length).expand(rows, -1).contiguous(), cu_seqlens=bounds)


def _other_tokens(batch: PackedBatch) -> PackedBatch:
    """The same batch with the tokens of every row backwards."""
    return replace(batch, input_ids=batch.input_ids.flip(-1))


def _other_labels(batch: PackedBatch) -> PackedBatch:
    """The same batch, predicting token 1 wherever it predicted something."""
    return replace(batch, labels=torch.where(batch.labels == IGNORE, batch.labels, torch.ones_like(batch.labels)))


def repeated(run: Run, probe: Probe, repeats: int) -> list[Finding]:
    """The same micro-step over and over, bit for bit: a race or an atomic sum shows as a difference."""
    marks = [gradients(run, probe) for _ in range(repeats)]
    different = sum(mark != marks[0] for mark in marks)
    return [Finding(f"{repeats} repeats have the same bits", different == 0, f"{different} differ" if different else "")]


def from_poisoned_memory(run: Run, own: Sequence[Probe]) -> list[Finding]:
    """Nothing is read before it is written: whatever `torch.empty` hands out, the results are the same."""
    plain, wrong = [gradients(run, probe) for probe in own], []
    for value in POISONS:
        with poisoned(value):
            if [gradients(run, probe) for probe in own] != plain:
                wrong.append(f"{value:g}")
    return [
        Finding(
            "nothing depends on uninitialised memory", not wrong, f"memory filled with {', '.join(wrong)}" if wrong else ""
        )
    ]


def second_backward(run: Run, batch: PackedBatch) -> list[Finding]:
    """Backward through one graph twice: a kernel that overwrites what it saved or was given shows."""
    batch = batch.to(run.device)
    run.optimizer.zero_grad()
    # Scaled as in a micro-step: a kernel that multiplies what it saved by the incoming gradient shows unless that is 1.
    loss = run.loss_head(run.model, forward_body(run.model, batch), batch) / max(batch.supervised_tokens, 2)
    marks, words = [], ""
    for again in (True, False):
        try:
            # That there will be another one is said to the first: compiled code may refuse already then.
            loss.backward(retain_graph=again)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # autograd's own refusal, too, of one that let go of what it saved
            words = f"it raises {str(error).splitlines()[0]}"
            break
        marks.append(fp.fingerprint(run.optimizer.gradients()))
        run.optimizer.zero_grad()
    run.optimizer.zero_grad()
    return [Finding("a second backward gives the same gradients", not words and marks[0] == marks[1], words)]


def documents_apart(run: Run, batch: PackedBatch) -> list[Finding]:
    """Editing documents leaves the loss and the input gradient of all others unchanged, bit for bit.

    Every second document is edited, then those between them, so that each boundary is crossed both ways. Documents keep
    their lengths and masks, so shapes and counts stay the same.
    """
    edges = [0, *torch.tensor(batch.lengths).cumsum(0).tolist()]
    spans = list(pairwise(edges))
    if len(spans) < 2:
        return []
    losses, places = [], []
    for own in (spans[1::2], spans[::2]):
        edited, elsewhere = batch, torch.ones(batch.positions, dtype=torch.bool)
        for start, end in own:
            edited = _edit(edited, start, end)
            elsewhere[start:end] = False
        (loss, gradient), (other_loss, other) = (_loss_and_input_gradient(run, side, elsewhere) for side in (batch, edited))
        if loss != other_loss:
            losses.append(f"{loss:.9g} and {other_loss:.9g}")
        if not torch.equal(gradient, other):
            places.append(int(elsewhere.nonzero().flatten()[_differing(gradient, other)[0]]))
    first = next((f"position {at}, document {_holder(spans, at)}" for at in places), "")
    return [
        Finding("editing a document leaves the loss of the others unchanged", not losses, losses[0] if losses else ""),
        Finding("editing a document leaves the input gradient of the others unchanged", not places, first),
    ]


def apart_in_a_step(run: Run, batch: PackedBatch) -> list[Finding]:
    """The same of the arm's own micro-step, whose parts cannot be called one by one when it is a graph: editing documents
    that are not supervised leaves loss and gradients of the step unchanged, bit for bit. Every second one, then the rest."""
    spans = list(pairwise([0, *torch.tensor(batch.lengths).cumsum(0).tolist()]))
    different = []
    for first, own in enumerate((spans[1::2], spans[::2])):
        labels = batch.labels.clone()
        for start, end in own:
            labels.view(-1)[start:end] = IGNORE
        quiet = edited = replace(batch, labels=labels, supervised_tokens=int((labels != IGNORE).sum()))
        for start, end in own:
            edited = _edit(edited, start, end)
        if quiet.supervised_tokens and own and gradients(run, (quiet,)) != gradients(run, (edited,)):
            different.append("odd" if first == 0 else "even")
    if len(spans) < 2:
        return []
    detail = f"documents of {' and '.join(different)} number were edited" if different else ""
    return [Finding("editing documents outside the loss leaves the micro-step unchanged", not different, detail)]


def _holder(spans: Sequence[tuple[int, int]], position: int) -> str:
    number, (start, end) = next((n, span) for n, span in enumerate(spans) if span[0] <= position < span[1])
    return f"{number}, which holds {start} to {end - 1}"


def _edit(batch: PackedBatch, start: int, end: int) -> PackedBatch:
    """Other tokens in [start, end): the same ones backwards, each one up, labels likewise."""
    ids, labels = batch.input_ids.clone(), batch.labels.clone()
    top = int(ids.max()) + 1
    part = (ids.view(-1)[start:end].flip(0) + 1) % top
    ids.view(-1)[start:end] = part
    own = labels.view(-1)[start:end]
    labels.view(-1)[start:end] = torch.where(own == IGNORE, own, (own + 1) % top)
    return replace(batch, input_ids=ids, labels=labels)


def _differing(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one != other).any(-1).nonzero().flatten() if one.shape == other.shape else torch.zeros(1, dtype=torch.int64)


def _loss_and_input_gradient(run: Run, batch: PackedBatch, elsewhere: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The loss of the positions `elsewhere` [T], and the gradient of the whole loss at their embeddings, [t, D]."""
    moved, mask = batch.to(run.device), elsewhere.to(run.device)
    labels = torch.where(mask.view_as(moved.labels), moved.labels, torch.full_like(moved.labels, IGNORE))
    others = replace(batch, labels=labels.cpu(), supervised_tokens=int((labels != IGNORE).sum())).to(run.device)
    with _embeddings(run) as made:
        hidden = forward_body(run.model, moved)
        loss = run.loss_head(run.model, hidden, moved)
        loss.backward()
    run.optimizer.zero_grad()
    with torch.no_grad():
        rest = run.loss_head(run.model, hidden.detach(), others)
    return float(rest), made[0].grad.flatten(0, -2)[mask].cpu()


@contextmanager
def _embeddings(run: Run):
    """Catches what the embedding gives out as a leaf of its own, so that its gradient can be read."""
    made: list[torch.Tensor] = []

    def cut(module, arguments, output):
        made.append(output.detach().requires_grad_())
        return made[-1]

    handle = run.model.get_input_embeddings().register_forward_hook(cut)
    try:
        yield made
    finally:
        handle.remove()
