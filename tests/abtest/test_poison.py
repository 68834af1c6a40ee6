"""Poisoned memory must show in whatever reads it, and leave nothing else changed."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from abtest.opcheck import check_op
from abtest.poison import POISONS, poisoned
from abtest.verdict import Check, Level
from kernels.contract import Op, Workload

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS, WIDTH = 8, 16
CASE = Workload("planted", {"T": ROWS, "I": WIDTH}, "float32", small=True)


@triton.jit
def _double_kernel(p_x, p_y, rows, WIDTH: tl.constexpr):
    i_row = tl.program_id(0)
    o_row = i_row * WIDTH + tl.arange(0, WIDTH)
    tl.store(p_y + o_row, 2.0 * tl.load(p_x + o_row), mask=i_row < rows)


@torch.library.custom_op("isoloss_poison::double", mutates_args=())
def double(x: Tensor, rows: int) -> Tensor:
    """2 x, of which only the first `rows` rows are written; the memory is asked for inside the custom op."""
    y = torch.empty_like(x)
    _double_kernel[(len(x),)](x, y, rows, WIDTH=x.shape[1])
    return y


def _keep_rows(ctx, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.rows = inputs[1]


def _differentiate(ctx, dy: Tensor) -> tuple[Tensor, None]:
    return double(dy.contiguous(), ctx.rows), None


double.register_autograd(_differentiate, setup_context=_keep_rows)


class LeftOver(torch.autograd.Function):
    """2 x; `leak` of memory that nobody wrote is added to one gradient row."""

    @staticmethod
    def forward(ctx, x: Tensor, leak: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.leak = leak
        return 2 * x

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        dx = 2 * dy
        dx[3] += ctx.leak(dy.new_empty(dy.shape))[3]
        return dx, None


def written(candidate: Callable[[Tensor], Tensor]) -> Check:
    """What the op check says of 2 x. Memory is zero at first, so that what is found doesn't hang on luck."""

    def inputs(workload: Workload, device: torch.device, seed: int) -> tuple[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        return (torch.randn(ROWS, WIDTH, generator=generator, device=device).requires_grad_(),)

    with poisoned(0.0):
        verdict = check_op(Op(lambda x: 2 * x, candidate, inputs, (CASE,), lambda w: 1, lambda w: 1), CASE, DEVICE).verdict
    check = next(check for check in verdict.checks if check.name == "fully written")
    assert check.passed or verdict.level is Level.FAILED
    return check


def test_a_kernel_that_writes_everything_passes():
    assert written(lambda x: double(x, ROWS)).passed


def test_a_row_that_a_kernel_leaves_unwritten_shows():
    check = written(lambda x: double(x, ROWS - 1))
    assert not check.passed
    assert {"output 0 (memory filled with nan)", "d x (memory filled with 10000)"} <= set(check.detail.split(", "))


@pytest.mark.parametrize(
    ("leak", "fillings"),
    [
        (lambda left: 0 * left, ["nan"]),  # spreads through a product with zero
        (lambda left: left.nan_to_num(0.0), ["10000"]),  # NaN is cleared away, what is finite isn't
        (lambda left: (left * 1e-4).nan_to_num(1.0).round(), ["nan", "10000"]),
        (lambda left: torch.zeros_like(left), []),
    ],
)
def test_each_filling_sees_what_another_misses(leak, fillings):
    check = written(lambda x: LeftOver.apply(x, leak))
    assert check.detail == ", ".join(f"d x (memory filled with {filling})" for filling in fillings)


@pytest.mark.parametrize("value", POISONS)
@pytest.mark.parametrize(
    "make",
    [
        lambda **kw: torch.empty(3, 2, **kw),
        lambda **kw: torch.empty((3, 2), **kw),
        lambda **kw: torch.empty_like(torch.zeros(3, 2), **kw),
        lambda **kw: torch.empty_strided((3, 2), (1, 3), **kw),
        lambda **kw: torch.empty_permuted((3, 2), (1, 0), **kw),
        lambda **kw: torch.zeros(1).new_empty(3, 2, **kw),
        lambda **kw: torch.zeros(1).new_empty_strided((3, 2), (2, 1), **kw),
    ],
    ids=["empty", "empty of a tuple", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"],
)
def test_every_entry_point_hands_out_the_value(make, value):
    wanted = torch.full((3, 2), value, device=DEVICE)
    with poisoned(value):
        made = make(device=DEVICE)
        assert made.shape == (3, 2) and made.dtype == torch.float32 and made.device.type == DEVICE.type
        torch.testing.assert_close(made, wanted, rtol=0, atol=0, equal_nan=True, check_stride=False)
        assert torch.equal(make(device=DEVICE, dtype=torch.bool), torch.full((3, 2), bool(value), device=DEVICE))
        assert make(device=DEVICE, requires_grad=True).is_leaf


@pytest.mark.parametrize(
    ("dtype", "for_nan", "for_1e4"),
    [
        (torch.int8, 127, 127), (torch.uint8, 255, 255), (torch.int32, 2**31 - 1, 10000), (torch.int64, 2**63 - 1, 10000),
        (torch.uint64, 2**63 - 1, 10000), (torch.bool, 1, 1),
    ],
)  # fmt: skip
def test_integers_hold_what_fits(dtype, for_nan, for_1e4):
    for value, wanted in ((math.nan, for_nan), (1e4, for_1e4), (0.0, 0)):
        with poisoned(value):
            assert [int(x) for x in torch.empty(2, dtype=dtype).tolist()] == [wanted] * 2


def test_other_floating_types():
    with poisoned(math.nan):
        assert torch.empty(2, dtype=torch.bfloat16).isnan().all() and torch.empty(2, dtype=torch.float16).isnan().all()
        assert torch.empty(2, dtype=torch.float8_e4m3fn).float().isnan().all()
        complex_one = torch.empty(2, dtype=torch.complex64)
        assert complex_one.real.isnan().all() and complex_one.imag.isnan().all()
        assert torch.empty(2, dtype=torch.float4_e2m1fn_x2).view(torch.uint8).tolist() == [255, 255]
    with poisoned(1e4):
        assert torch.empty(1, dtype=torch.float8_e4m3fn).float().item() == 448.0  # its largest
        assert torch.empty(1, dtype=torch.float16).item() == 1e4
    with poisoned(0.0):
        assert torch.empty(2, dtype=torch.float4_e2m1fn_x2).view(torch.uint8).tolist() == [0, 0]


def test_what_is_not_fresh_memory_is_left_alone():
    kept = torch.ones(3)
    with poisoned(math.nan):
        assert torch.empty(3, out=kept) is kept
        assert torch.empty(0).shape == (0,) and torch.empty(2, 0, 3).numel() == 0
        assert torch.empty(3, device="meta").device.type == "meta"
        assert torch.zeros(3).eq(0).all() and torch.full((2,), 7.0).eq(7).all() and torch.tensor([1.0]).item() == 1.0
    assert kept.tolist() == [1.0] * 3


def test_other_threads_see_it():
    found = []
    with poisoned(1e4):
        thread = threading.Thread(target=lambda: found.append(torch.empty(2).tolist()))
        thread.start()
        thread.join()
    assert found == [[1e4, 1e4]]


def test_it_goes_away_even_after_an_exception():
    before = torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty
    own = "new_empty" in vars(torch.Tensor)
    state = torch.get_rng_state()
    with pytest.raises(KeyError), poisoned(math.nan), poisoned(1e4):
        assert torch.empty(1).item() == 1e4
        raise KeyError
    assert before == (torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty)
    assert ("new_empty" in vars(torch.Tensor)) is own
    assert not torch.are_deterministic_algorithms_enabled() and torch.equal(torch.get_rng_state(), state)


def test_an_inner_value_gives_way_to_the_outer_one():
    with poisoned(1e4):
        with poisoned(0.0):
            assert torch.empty(1).item() == 0.0
        assert torch.empty(1).item() == 1e4


def test_device_contexts_know_the_constructors_afterwards():
    torch.utils._device._device_constructors.cache_clear()  # as in a process that used no device context yet
    with poisoned(0.0), torch.device("meta"):
        assert torch.empty(1).device.type == "meta"
    with torch.device("meta"):
        assert torch.empty(1).device.type == "meta"
