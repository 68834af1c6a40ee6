"""tma_matmul: the product against fp64 by programs that stay for several blocks, what TMA takes, and the swap on a model."""

from __future__ import annotations

import contextvars
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import triton
from products import DEVICE, SMALL, assert_is_product, normal
from torch import Tensor

from kernels.registry import select
from loop import lora
from loop.config import Config, DataConfig, LoraConfig
from loop.errors import UserError
from loop.model import load_model
from negative_results.sm121a_matmul import table
from negative_results.sm121a_matmul.dispatch import DispatchedLinear, linear
from negative_results.sm121a_matmul.patch import plain_linears
from negative_results.sm121a_matmul.table import Entry, device_key
from negative_results.tma_matmul import OPTIMIZATION, kernel, patch
from negative_results.tma_matmul.kernel import PROGRAMS_INTERPRETED, matmul
from negative_results.tma_matmul.patch import ENGINE, apply, eligible
from negative_results.tma_matmul.tile import TILES, takes

VOCABULARY = 128

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="this GPU has no TMA"
)


@pytest.mark.parametrize("tile", [SMALL, *TILES], ids=str)
@pytest.mark.parametrize("T, D, O", [(1, 4, 4), (131, 72, 200), (37, 256, 60)], ids=str)
def test_the_layer_s_products_with_ragged_edges(tile, T, D, O):
    x, weight, dy = normal(T, D), normal(O, D, seed=1), normal(T, O, seed=2)
    for a, b in ((x, weight.t()), (dy, weight), (dy.t(), x), (x, weight.t().contiguous()), (dy.t(), x.t().contiguous().t())):
        if takes(a, b):
            assert_is_product(matmul(a, b, tile), a, b)
    assert takes(x, weight.t()) and takes(dy, weight) and takes(dy.t(), x)


@pytest.mark.parametrize("blocks", [1, PROGRAMS_INTERPRETED, PROGRAMS_INTERPRETED + 1, 4 * PROGRAMS_INTERPRETED - 1])
def test_programs_compute_all_blocks_however_many_fall_to_each(blocks):
    a, b = normal(16 * blocks - 3, 20), normal(20, 32, seed=1)
    assert_is_product(matmul(a, b, SMALL), a, b)


def test_no_more_programs_than_blocks_or_processors(monkeypatch):
    started = []

    class Spy:
        def __getitem__(self, grid):
            started.append(grid)
            return lambda *arguments, **keywords: None

    monkeypatch.setattr(kernel, "_matmul_kernel", Spy())
    monkeypatch.setattr(kernel, "INTERPRETED", False)
    monkeypatch.setattr(kernel, "_processors", lambda device: 48)
    for rows in (16, 16 * 47, 16 * 48, 16 * 500):
        a, b = normal(rows, 20), normal(20, 32, seed=1)
        kernel._launch(a, b, a.new_empty(rows, 32), list(SMALL))
    assert started == [(1,), (47,), (48,), (48,)]


def test_what_lies_beyond_the_edges_is_not_read():
    """A NaN one element past each edge would reach a product that reads it."""
    a, b = (torch.full((70, 80), math.nan, device=DEVICE) for _ in range(2))
    a[:33, :36], b[:36, :44] = normal(33, 36), normal(36, 44, seed=1)
    assert_is_product(matmul(a[:33, :36], b[:36, :44], SMALL), a[:33, :36], b[:36, :44])


def test_empty_matrices_and_the_same_bits_every_time():
    assert matmul(normal(0, 8), normal(8, 4)).shape == (0, 4)
    assert torch.equal(matmul(normal(0, 4).t(), normal(0, 8)), torch.zeros(4, 8, device=DEVICE))  # no rows, so no dW
    a, b = normal(50, 300), normal(300, 40, seed=1)
    first = matmul(a, b, SMALL)
    assert all(torch.equal(matmul(a, b, SMALL), first) for _ in range(3))


def test_what_tma_takes():
    wide = normal(20, 48)
    right = normal(40, 24, seed=1)
    assert takes(wide[:, :40], right)  # rows at multiples of 192 bytes
    assert not takes(wide[:, :40], right[:, :23])  # rows of the result at multiples of 92 bytes
    assert not takes(normal(20, 42)[:, :40], right)  # rows at multiples of 168
    assert not takes(wide[:, ::2], normal(24, 24))  # elements apart
    assert not takes(normal(1, 40).expand(20, 40), right)  # one row for all: the gradient that a sum sends back
    assert takes(wide[:, :40].bfloat16(), right.bfloat16())
    assert not takes(normal(20, 44).bfloat16()[:, :40], right.bfloat16())  # rows at multiples of 88
    with pytest.raises(ValueError, match=r"TMA needs contiguous rows.*\[20, 24\] with strides \(48, 2\)"):
        matmul(wide[:, ::2], normal(24, 24))
    with pytest.raises(ValueError, match=r"\[M, K\] and \[K, N\]"):
        matmul(wide, right)


def test_what_begins_elsewhere_is_left_to_torch_mm(monkeypatch):
    launched = []
    monkeypatch.setattr(kernel, "_launch", lambda *arguments: launched.append(arguments))
    wide, right = normal(20, 48), normal(40, 24, seed=1)
    for a, b in ((wide[:, 1:41], right), (right.t(), normal(40, 52, seed=2)[:, 3:51])):
        assert takes(a, b) and torch.equal(matmul(a, b, SMALL), a @ b)
    assert not launched
    matmul(wide[:, 4:44], right, SMALL)
    assert len(launched) == 1


def test_each_launch_has_its_own_allocator_and_leaves_the_other_s(monkeypatch):
    from triton.runtime._allocation import _allocator

    def other(size: int, alignment: int, stream: int | None) -> Tensor:
        raise AssertionError("another library's allocator was asked")

    launch, seen = kernel._launch, []

    def watched(*arguments) -> None:
        launch(*arguments)
        seen.append(_allocator.get())

    def as_another_library_does() -> None:
        triton.set_allocator(other)
        matmul(normal(40, 20), normal(20, 32, seed=1), SMALL)
        seen.append(_allocator.get())

    monkeypatch.setattr(kernel, "_launch", watched)
    contextvars.copy_context().run(as_another_library_does)
    assert seen == [kernel._workspace, other]


def test_the_layer_s_gradients_and_no_graph_break():
    x, weight, dy = normal(3, 7, 20).requires_grad_(), normal(12, 20, seed=1).requires_grad_(), normal(3, 7, 12, seed=2)

    def ours(kind: str, left: Tensor, right: Tensor) -> Tensor:
        return matmul(left, right, SMALL)

    want = F.linear(x, weight)
    wanted = torch.autograd.grad(want, (x, weight), dy)
    for function in (linear, torch.compile(linear, backend="aot_eager", fullgraph=True)):
        got = function(x, weight, ours)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, (x, weight), dy), wanted)


def test_a_well_behaved_custom_op():
    arguments = (normal(9, 20), normal(20, 12, seed=1), list(SMALL))
    assert set(torch.library.opcheck(torch.ops.isoloss.tma_matmul.default, arguments).values()) == {"SUCCESS"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter truncates bf16 and specialises nothing")
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("T, D, O", [(5376, 2048, 6144), (5375, 1024, 3584), (257, 72, 200)], ids=str)
def test_the_layer_s_products_in_bf16(tile, T, D, O):
    x, weight, dy = (normal(*size, dtype=torch.bfloat16, seed=i) for i, size in enumerate(((T, D), (O, D), (T, O))))
    for a, b in ((x, weight.t()), (dy, weight), (dy.t(), x)):
        assert_is_product(matmul(a, b, tile), a, b)


def test_the_table_that_ships_holds_its_own_tiles():
    assert [entry for entry in table.load(ENGINE.table) if entry.tile not in TILES] == []
    assert ENGINE.table.parent.name == "tma_matmul" and ENGINE.table.read_text(encoding="utf-8").startswith("# Measured by")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_swap_keeps_the_parameters_and_the_function(method, tmp_path, monkeypatch):
    config = Config(model="qwen3.5-shallow-tiny", device=DEVICE.type, dtype="float32", data=DataConfig(pack_length=48))
    run = SimpleNamespace(model=load_model(config, VOCABULARY), device=DEVICE, config=config)
    if method == "lora":
        lora.attach(run.model, LoraConfig(rank=4), seed=0)
    reason = eligible(run)
    assert "no shape of this model has a measured win" in reason and "negative_results.tma_matmul.tune" in reason
    won = Entry(
        device_key(DEVICE), "float32", "y", 64, 384, 128, TILES[-1], True, 1.2, 1.1, 1.3, 48, "torch 2.11, Triton 3.7.1"
    )
    table.save(tmp_path / "table.toml", [dataclasses.replace(won, product=product) for product in table.PRODUCTS])
    called = []
    engine = dataclasses.replace(
        ENGINE, table=tmp_path / "table.toml", matmul=lambda a, b, tile: called.append(tile) or matmul(a, b, tile)
    )
    monkeypatch.setattr(patch, "ENGINE", engine)
    layers = {name for name, layer in plain_linears(run.model).items() if tuple(layer.weight.shape) == (384, 128)}
    before, want = dict(run.model.named_parameters()), outcome(run)
    assert eligible(run) is None
    apply(run)
    assert {name for name, module in run.model.named_modules() if isinstance(module, DispatchedLinear)} == layers != set()
    assert all(parameter is before[name] for name, parameter in run.model.named_parameters())
    for mine, theirs in zip(outcome(run), want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    assert len(called) == len(layers) * (3 if method == "full" else 2) and set(called) == {TILES[-1]}


def outcome(run: SimpleNamespace) -> list[Tensor]:
    ids = torch.arange(48, device=DEVICE)[None]
    loss = run.model(ids, labels=ids).loss
    return [loss, *torch.autograd.grad(loss, [p for p in run.model.parameters() if p.requires_grad])]


@pytest.mark.parametrize("other", ["full_ft_linear", "lora_matmul", "static_lora", "sm121a_matmul"])
def test_others_want_the_same_layers(other):
    with pytest.raises(UserError, match="can't be on together"):
        select(["tma_matmul", other])
    assert OPTIMIZATION.needs.capability[0] == (9, 0)
