"""Check 5 lets the reference pass on every kind of model, and names the defects of `structure_defects`."""

from __future__ import annotations

import pytest
import torch
from structure_defects import ALL, DEFECTS, Defect
from tiny import gradients, tiny, tricky, two_probes

from abtest import structure
from abtest.poison import POISONS, poisoned
from loop.batch import IGNORE
from loop.model import plain_micro_step
from loop.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")


def examined(run: Run) -> dict[str, structure.Finding]:
    found = structure.examine(run, two_probes(run), 2, lambda done, total: None)
    assert [finding.name for finding in found] == list(ALL)
    return {finding.name: finding for finding in found}


def failures(run: Run) -> set[str]:
    return {name for name, finding in examined(run).items() if not finding.passed}


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("model", ["qwen3.5-shallow-tiny", "qwen3-shallow-tiny", "mistral-tiny"])
def test_the_reference_passes(model: str, method: str, checkpointed: bool) -> None:
    run, _ = tiny(model, method, gradient_checkpointing=checkpointed)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    assert failures(run) == set()
    assert all(gradient is None for gradient in run.optimizer.gradients().values())
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())


def test_the_reference_passes_with_moments_in_its_optimizer() -> None:
    run, _ = tiny()
    run.micro_step(run, tricky(run, 0), 50)
    run.optimizer.step(0)
    assert len(run.optimizer.state()) > len(run.optimizer.masters)
    assert failures(run) == set()


@pytest.mark.parametrize("defect", DEFECTS.values(), ids=DEFECTS.keys())
def test_a_planted_defect_is_named(defect: Defect) -> None:
    run, _ = tiny(defect.model)
    defect.plant(run)
    found = examined(run)
    failed = {name for name, finding in found.items() if not finding.passed}
    assert failed == set(defect.fails) if defect.alone else failed >= set(defect.fails)
    assert defect.detail in found[defect.fails[-1]].detail


def test_every_finding_has_a_defect() -> None:
    assert {name for defect in DEFECTS.values() for name in defect.fails} == set(ALL)


def test_an_edited_document_keeps_lengths_masks_and_vocabulary() -> None:
    run, _ = tiny()
    batch = tricky(run, 1)
    edited = structure._edit(batch, 10, 70)
    changed = (edited.input_ids != batch.input_ids).flatten()
    assert changed[10:70].float().mean() > 0.9 and not changed[:10].any() and not changed[70:].any()
    assert torch.equal(edited.labels == IGNORE, batch.labels == IGNORE)
    assert int(edited.input_ids.max()) < run.model.config.vocab_size
    assert edited.lengths == batch.lengths


def test_one_document_has_nobody_to_leak_into() -> None:
    run, _ = tiny()
    batch = tricky(run, 1)
    whole = structure._joined(batch)
    assert whole.lengths == (batch.positions,)
    assert structure.documents_apart(run, whole) == []


def test_poison_fills_what_nobody_wrote_and_goes_away() -> None:
    plain = torch.empty
    for value in POISONS:
        with poisoned(value):
            made = torch.empty(3)
            assert torch.equal(made, torch.full((3,), value)) or (value != value and bool(made.isnan().all()))
    assert torch.empty is plain


class OnlyOnce(torch.autograd.Function):
    """Lets go of what it saved during backward, as code does that hands its memory on. times: backwards until then."""

    @staticmethod
    def forward(ctx, x, times):
        ctx.held = [x.new_ones(())] * times
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        if not ctx.held:
            raise RuntimeError("its memory was handed on\nand a second line")
        return dy * ctx.held.pop(), None


@pytest.mark.parametrize("times", [0, 1], ids=["it refuses when another is announced", "it refuses the other one"])
def test_a_backward_that_can_be_asked_for_once_alone_is_found(times) -> None:
    run, _ = tiny()
    batch, head = tricky(run, 4), run.loss_head
    (fine,) = structure.second_backward(run, batch)
    run.loss_head = lambda model, hidden, batch: head(model, OnlyOnce.apply(hidden, times), batch)
    (found,) = structure.second_backward(run, batch)
    assert fine.passed and not found.passed and found.name == fine.name
    assert found.detail == "it raises its memory was handed on"
    assert all(gradient is None or not gradient.any() for gradient in run.optimizer.gradients().values())


def test_findings_leave_the_gradients_of_a_run_as_they_are() -> None:
    run, _ = tiny()
    batch = tricky(run, 4)
    before = gradients(run, batch)
    structure.documents_apart(run, batch)
    structure.second_backward(run, batch)
    after = gradients(run, batch)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert run.micro_step is plain_micro_step
