"""The trace shows where two arms begin to differ, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import gradients, tiny, tricky
from torch import Tensor, nn

from abtest.catalogue.patching import bend_gradient, bend_output
from abtest.oracle import exact_arithmetic, make_exact
from abtest.trace import compare, places, trace
from loop.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")

BODY = "model"


def traced(run: Run, path: Path) -> Path:
    trace(run, tricky(run, 1), path)
    return path


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[Path, Path]:
    """The reference's trace and the oracle's."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trace")
    exact, _ = tiny("qwen3.5-tiny")
    dtype = make_exact(exact)
    with exact_arithmetic(dtype):
        oracle = traced(exact, folder / "oracle.safetensors")
    return traced(tiny("qwen3.5-tiny")[0], folder / "stock.safetensors"), oracle


def rows_of(reference: tuple[Path, Path], plant: Callable[[Run], None], folder: Path, **changes) -> list[dict]:
    run, _ = tiny("qwen3.5-tiny", **changes)
    plant(run)
    return compare(reference[0], traced(run, folder / "candidate.safetensors"), reference[1])


def order(rows: list[dict], phase: str) -> list[str]:
    return [row["module"] for row in rows if row["phase"] == phase]


def different(rows: list[dict], phase: str) -> list[str]:
    return [row["module"] for row in rows if row["phase"] == phase and not row["same_bits"]]


def layer_places(layer: int, mixer: str) -> list[str]:
    return [f"{BODY}.layers.{layer}.{mixer}", f"{BODY}.layers.{layer}.mlp", f"{BODY}.layers.{layer}"]


EVERY = [
    f"{BODY}.embed_tokens",
    *(place for layer in range(3) for place in layer_places(layer, "linear_attn")),
    *layer_places(3, "self_attn"),
    f"{BODY}.norm",
]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_reference_has_its_own_bits_everywhere_in_order(reference, checkpointed: bool, tmp_path: Path) -> None:
    rows = rows_of(reference, lambda run: None, tmp_path, gradient_checkpointing=checkpointed)
    assert order(rows, "forward") == EVERY
    assert order(rows, "backward") == EVERY[:0:-1]  # LoRA: nothing flows back into the embedding
    assert [row["phase"] for row in rows] == sorted((row["phase"] for row in rows), reverse=True)
    assert all(row["same_bits"] and row["relative"] == 0 for row in rows)
    assert all(row["beside"] < 1e-4 for row in rows)
    assert all(row["beside"] > 0 for row in rows[1:])  # the embedding is looked up, the same bits in fp64


def scaled(place: str) -> Callable[[Run], None]:
    return lambda run: bend_output(run.model, place, lambda out, *inputs: 1.001 * out)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("place", [f"{BODY}.layers.2.mlp", f"{BODY}.layers.1.linear_attn", f"{BODY}.layers.3.self_attn"])
def test_forward_differs_from_the_defect_on(reference, place: str, checkpointed: bool, tmp_path: Path) -> None:
    def plant(run: Run) -> None:
        if place.endswith("self_attn"):  # it gives out more than a tensor
            scaled(f"{place}.o_proj")(run)
        else:
            scaled(place)(run)

    rows = rows_of(reference, plant, tmp_path, gradient_checkpointing=checkpointed)
    assert order(rows, "forward") == EVERY
    assert different(rows, "forward") == EVERY[EVERY.index(place) :]
    own = next(row for row in rows if row["module"] == place and row["phase"] == "forward")
    assert own["relative"] == pytest.approx(1e-3, rel=1e-3) and own["beside"] < own["relative"] / 10


def test_a_gradient_that_is_wrong_backward_alone_shows_from_there_back(reference, tmp_path: Path) -> None:
    """What arrives at the bent MLP is still right; what it hands on isn't: its input's gradient, and all before it."""

    def plant(run: Run) -> None:
        bend_output(run.model, f"{BODY}.layers.1.mlp", lambda out, *inputs: bend_gradient(out, lambda g: 1.001 * g))

    rows = rows_of(reference, plant, tmp_path)
    assert different(rows, "forward") == []
    before = EVERY[1 : EVERY.index(f"{BODY}.layers.1.mlp")]
    assert different(rows, "backward") == before[::-1]


class Fused(nn.Module):
    """A decoder layer in one piece: the old one, where no module's name says what it does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.whole = layer

    def forward(self, *inputs, **options):
        return self.whole(*inputs, **options)


def test_a_fused_layer_is_traced_as_a_whole(reference, tmp_path: Path) -> None:
    name = f"{BODY}.layers.1"

    def plant(run: Run) -> None:
        run.model.set_submodule(name, Fused(run.model.get_submodule(name)))

    rows = rows_of(reference, plant, tmp_path)
    left = [place for place in EVERY if not place.startswith(f"{name}.")]
    assert order(rows, "forward") == left and order(rows, "backward") == left[:0:-1]
    assert all(row["same_bits"] for row in rows)


def test_places_are_named_the_same_with_adapters_and_without() -> None:
    for method in ("lora", "full"):
        assert sorted(places(tiny("qwen3.5-tiny", method=method)[0].model)) == sorted(EVERY)


def test_full_training_shows_what_arrives_at_the_embedding(tmp_path: Path) -> None:
    run, _ = tiny("qwen3.5-tiny", method="full")
    kept = load_file(traced(run, tmp_path / "full.safetensors"))
    assert set(kept) == {f"{phase} {place}" for phase in ("forward", "backward") for place in EVERY}
    assert all(value.shape == (1, tricky(run, 1).positions, 128) for value in kept.values())


def test_a_number_that_is_none_is_not_the_same(reference, tmp_path: Path) -> None:
    def plant(run: Run) -> None:
        bend_output(run.model, f"{BODY}.layers.2.mlp", lambda out, *inputs: out * torch.nan)

    rows = rows_of(reference, plant, tmp_path)
    assert different(rows, "forward")[0] == f"{BODY}.layers.2.mlp"
    assert all(row["relative"] != row["relative"] for row in rows if not row["same_bits"])


def test_a_trace_leaves_nothing_behind(tmp_path: Path) -> None:
    run, _ = tiny("qwen3.5-tiny")
    batch = tricky(run, 2)
    before = gradients(run, batch)
    traced(run, tmp_path / "one.safetensors")
    assert not any(module._forward_hooks for module in places(run.model).values())
    assert all(gradient is None for gradient in run.optimizer.gradients().values())
    after: dict[str, Tensor] = gradients(run, batch)
    assert all(torch.equal(before[name], after[name]) for name in before)
