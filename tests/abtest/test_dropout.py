"""Check 5 with dropout on: the reference and a rewrite pass, and an adapter whose backward forgets the mask is named."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import tiny, tricky
from torch import Tensor, nn

from abtest import dropout
from abtest.catalogue.patching import override
from loop.lora import adapters
from loop.run import Run
from loop.training import switch_on

pytestmark = pytest.mark.usefixtures("one_thread")
MASK, ADJOINT = "dropout: backward uses forward's mask", "dropout: each adapter's backward is the adjoint of its forward"


def with_dropout(**lora) -> Run:
    config = dropout.dropout_config(tiny()[0].config)
    return tiny(lora=dataclasses.replace(config.lora, **lora))[0]


def failures(run: Run) -> dict[str, str]:
    found = dropout.examine(run, tricky(run, 1), lambda done, total: None)
    assert len(found) == 6
    return {finding.name: finding.detail for finding in found if not finding.passed}


@pytest.mark.parametrize(("rank", "alpha"), [(8, 16.0), (4, 64.0), (16, 1.0), (64, 64.0), (2, 4.0)])
def test_the_reference_passes(rank: int, alpha: float) -> None:
    assert failures(with_dropout(rank=rank, alpha=alpha)) == {}


def test_a_rewrite_passes() -> None:
    run = with_dropout()
    switch_on(run, ["static_lora"])
    assert run.enabled == ["static_lora"] and failures(run) == {}


class _Halves(torch.autograd.Function):
    """Dropout forward; `change` says what backward multiplies by instead of the mask."""

    @staticmethod
    def forward(ctx, x: Tensor, change) -> Tensor:
        mask = nn.functional.dropout(torch.ones_like(x), dropout.RATE)
        ctx.factor = change(mask)
        return x * mask

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def forgetting(change, number: int) -> Run:
    """A run in which one adapter alone has another mask backward."""
    run = with_dropout()
    adapter = list(adapters(run.model))[number]
    module = run.model.get_submodule(adapter.name)

    def forward(x: Tensor) -> Tensor:
        down = nn.functional.linear(_Halves.apply(x, change), adapter.a)
        return module.base_layer(x) + nn.functional.linear(down, adapter.b) * adapter.scaling

    override(run.model, adapter.name, "forward", lambda original: forward)
    return run


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("change", [torch.ones_like, lambda mask: mask.roll(1, -1), lambda mask: (mask > 0).float()])
def test_one_adapter_that_forgets_its_mask_is_named(change, number: int) -> None:
    run = forgetting(change, number)
    found = failures(run)
    assert list(adapters(run.model))[number].name in found[ADJOINT] and "input" in found[ADJOINT]


def test_one_adapter_with_its_own_mask_kept_passes() -> None:
    assert failures(forgetting(lambda mask: mask, 0)) == {}


def test_a_module_that_is_not_linear_is_left_to_the_slope() -> None:
    run = with_dropout()
    name = next(adapters(run.model)).name
    override(run.model, name, "forward", lambda original: lambda x: original(x).tanh())
    assert ADJOINT not in failures(run)


@pytest.mark.parametrize("number", [0, -1])
def test_one_adapter_that_does_not_make_up_for_what_it_drops_is_named(number: int) -> None:
    run = with_dropout()
    adapter = list(adapters(run.model))[number]

    def forward(x: Tensor) -> Tensor:
        kept = x * (torch.rand_like(x) >= dropout.RATE)
        return adapter.base(x) + nn.functional.linear(nn.functional.linear(kept, adapter.a), adapter.b) * adapter.scaling

    override(run.model, adapter.name, "forward", lambda original: forward)
    assert adapter.name in failures(run)["dropout: on average nothing is lost"]


def test_every_adapter_is_asked() -> None:
    run = with_dropout()
    assert set(dropout._called_adapters(run, tricky(run, 1))) == {adapter.name for adapter in adapters(run.model)}
