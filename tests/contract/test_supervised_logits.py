"""supervised_logits: what is not supervised leaves no trace, and any number of supervised positions works."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kernels.contract import Workload
from kernels.supervised_logits import OPTIMIZATION
from kernels.supervised_logits.kernel import LEAST_ROWS, supervised_cross_entropy
from kernels.supervised_logits.patch import apply, eligible
from loop.batch import IGNORE
from loop.model import cross_entropy_head

CPU = torch.device("cpu")
SHAPE = {"B": 2, "L": 80, "D": 32, "V": 97, "trained": 1}
NUMBERS = (0, 1, 5, LEAST_ROWS, LEAST_ROWS + 1, 158)


def inputs(supervised: int, seed: int = 0):
    workload = Workload("case", SHAPE | {"S": supervised}, "float32")
    return OPTIMIZATION.op.inputs(workload, CPU, seed)


def outcome(head, model, hidden, batch):
    """Loss, d hidden and d weight."""
    loss = head(model, hidden, batch)
    return [loss.detach(), *torch.autograd.grad(loss, [hidden, model.lm_head.weight])]


@pytest.mark.parametrize("supervised", NUMBERS)
def test_the_inputs_are_a_batch(supervised):
    _, hidden, batch = inputs(supervised)
    assert hidden.shape == (2, 80, 32) and batch.labels.shape == (2, 80)
    assert batch.supervised_tokens == len(batch.supervised_positions) == supervised
    assert batch.lengths == (80, 80) and bool((batch.labels[:, -1] == IGNORE).all())
    rows, columns = (batch.labels != IGNORE).nonzero(as_tuple=True)
    assert torch.equal(batch.labels[rows, columns], batch.input_ids[rows, columns + 1])


@pytest.mark.parametrize("supervised", NUMBERS)
def test_loss_and_gradients_are_the_reference_s(supervised):
    for ours, theirs in zip(
        outcome(supervised_cross_entropy, *inputs(supervised)), outcome(cross_entropy_head, *inputs(supervised)), strict=True
    ):
        assert ours.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("supervised", NUMBERS)
def test_gradient_is_exactly_zero_where_nothing_is_supervised(supervised):
    model, hidden, batch = inputs(supervised)
    loss, d_hidden, d_weight = outcome(supervised_cross_entropy, model, hidden, batch)
    ignored = batch.labels == IGNORE
    assert not d_hidden[ignored].any()
    assert bool(d_hidden[~ignored].any(dim=-1).all())
    assert (float(loss) == 0.0 and not d_weight.any()) is (supervised == 0)


@pytest.mark.parametrize("supervised", NUMBERS)
def test_unsupervised_positions_do_not_matter(supervised):
    model, hidden, batch = inputs(supervised)
    before = outcome(supervised_cross_entropy, model, hidden, batch)
    other = torch.where((batch.labels == IGNORE)[..., None], 50 * torch.randn_like(hidden), hidden).detach().requires_grad_()
    for one, two in zip(outcome(supervised_cross_entropy, model, other, batch), before, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("supervised", NUMBERS)
def test_the_head_sees_supervised_rows_only(supervised):
    model, hidden, batch = inputs(supervised)
    seen = []
    model.lm_head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    supervised_cross_entropy(model, hidden, batch)
    (rows,) = seen
    assert rows.shape == (max(supervised, LEAST_ROWS), 32)
    assert torch.equal(rows[:supervised], hidden.flatten(0, 1)[batch.supervised_positions])


def test_a_batch_smaller_than_the_least_number_of_rows():
    model, hidden, batch = OPTIMIZATION.op.inputs(Workload("case", SHAPE | {"B": 1, "L": 3, "S": 1}, "float32"), CPU, 0)
    ours = supervised_cross_entropy(model, hidden, batch)
    torch.testing.assert_close(ours, cross_entropy_head(model, hidden, batch))


def test_the_swap():
    run = SimpleNamespace(loss_head=cross_entropy_head)
    assert eligible(run) is None
    apply(run)
    assert run.loss_head is supervised_cross_entropy
    assert eligible(run) == "another optimization already owns the loss head"


def test_least_work_by_hand():
    frozen = Workload("case", SHAPE | {"S": 10, "trained": 0}, "bfloat16")
    trained = Workload("case", SHAPE | {"S": 10}, "bfloat16")
    product = 2 * 10 * 32 * 97
    assert [OPTIMIZATION.op.flops(w) for w in (frozen, trained)] == [2 * product, 3 * product]
    rows, weight, d_hidden = 10 * 32, 97 * 32, 160 * 32
    assert OPTIMIZATION.op.bytes_moved(frozen) == 2 * (2 * rows + 2 * weight + d_hidden)
    assert OPTIMIZATION.op.bytes_moved(trained) == 2 * (2 * rows + 3 * weight + d_hidden)
