"""linear_cross_entropy: the function beside fp64 truth, its chunks, and where nothing may be lost or done for nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from kernels.linear_cross_entropy import PACK_2B, kernel
from kernels.linear_cross_entropy.kernel import cross_entropy_rows_, linear_cross_entropy, rows_a_chunk
from loop.batch import IGNORE

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(1, 8, 5), (2, 3, 2), (7, 16, 127), (64, 32, 129), (150, 40, 1021)]  # N, D, V


def inputs(n: int, d: int, v: int, dtype: torch.dtype = torch.float32, ignored: float = 0.3, trained: bool = True):
    """rows and weight that require gradients, and labels of which about a part `ignored` is; the first one counts."""
    generator = torch.Generator().manual_seed(n + d + v)
    rows = torch.randn(n, d, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight = (2 * d**-0.5 * torch.randn(v, d, generator=generator)).to(DEVICE, dtype).requires_grad_(trained)
    labels = torch.randint(v, (n,), generator=generator)
    left_out = torch.rand(n, generator=generator) < ignored
    left_out[:1] = False
    return rows, weight, labels.masked_fill(left_out, IGNORE).to(DEVICE)


def truth(rows, weight, labels, factor: float = 1.0) -> list[torch.Tensor]:
    """Loss, d rows and d weight in fp64."""
    rows, weight = (side.detach().double().requires_grad_() for side in (rows, weight))
    loss = F.cross_entropy(rows @ weight.T, labels, ignore_index=IGNORE, reduction="sum")
    return [loss.detach(), *torch.autograd.grad(loss, (rows, weight), torch.full_like(loss, factor))]


def outcome(rows, weight, labels, factor: float = 1.0) -> list[torch.Tensor]:
    loss = linear_cross_entropy(rows, weight, labels)
    assert loss.dtype == torch.float32 and loss.shape == ()
    return [loss.detach(), *torch.autograd.grad(loss, (rows, weight), torch.full_like(loss, factor))]


def assert_near(got, want, tolerance: float = 2e-6) -> None:
    """Every value within `tolerance` of the largest one."""
    for mine, right in zip(got, want, strict=True):
        assert mine.shape == right.shape
        error, size = (mine.double() - right.double()).abs().max(), right.double().abs().max()
        assert error <= tolerance * size, (tuple(mine.shape), float(error), float(size))


def in_chunks_of(monkeypatch, size: int) -> list[int]:
    """Sets how many rows a chunk has; the list that it gives fills with the rows of each chunk that ran."""
    ran, original = [], cross_entropy_rows_

    def recorded(logits, labels, losses, gradient):
        ran.append(len(logits))
        original(logits, labels, losses, gradient)

    monkeypatch.setattr(kernel, "rows_a_chunk", lambda rows, vocabulary, itemsize: size)
    monkeypatch.setattr(kernel, "cross_entropy_rows_", recorded)
    return ran


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients_are_the_truth_s(shape):
    case = inputs(*shape)
    assert_near(outcome(*case), truth(*case))


@pytest.mark.parametrize("size", [1, 6, 7, 50, 149, 150, 400])
def test_chunks_of_any_size(monkeypatch, size):
    case = inputs(150, 40, 257)
    ran = in_chunks_of(monkeypatch, size)
    assert_near(outcome(*case), truth(*case))
    assert ran == [min(size, 150 - start) for start in range(0, 150, size)]


@pytest.mark.parametrize("factor", [0.37, -3.0, 1e-6, 0.0])
def test_the_incoming_gradient_is_a_factor(factor):
    case = inputs(40, 24, 97)
    assert_near(outcome(*case, factor), truth(*case, factor))


def test_a_second_backward_has_the_same_bits_and_a_third_another_factor():
    rows, weight, _ = case = inputs(70, 24, 97)
    loss = linear_cross_entropy(*case)
    one, two = (torch.autograd.grad(loss, (rows, weight), retain_graph=True) for _ in range(2))
    assert all(torch.equal(first, second) for first, second in zip(one, two, strict=True))
    assert_near(torch.autograd.grad(loss * 5, (rows, weight)), truth(*case, 5.0)[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lead", [4.0, 8.0, 12.0])
def test_a_small_difference_at_p_near_1(lead, dtype):
    """1 - p(target) down to 1e-4: a p rounded to bf16 before 1 goes off would leave 0 or 2^-8 of it."""
    logits = torch.zeros(3, 9, device=DEVICE)
    logits[:, 4] = lead
    labels = torch.tensor([4, 4, 0], device=DEVICE)
    gradient, losses = logits.to(dtype, copy=True), torch.empty(3, device=DEVICE)
    cross_entropy_rows_(gradient, labels, losses, True)
    right = torch.softmax(logits.double(), -1) - F.one_hot(labels, 9)
    rounding = 1e-6 / float(-right[0, 4]) if dtype == torch.float32 else 2**-7  # the interpreter truncates bf16
    torch.testing.assert_close(gradient.double(), right, rtol=rounding, atol=0)
    wanted = F.cross_entropy(logits.double(), labels, reduction="none")
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("width", [8191, 8192, 8193, 70_001])
def test_rows_wider_than_a_block(width):
    logits = 3 * torch.randn(3, width, generator=torch.Generator().manual_seed(width)).to(DEVICE)
    logits[0, -1] = 25.0  # the largest comes last
    labels, losses, gradient = torch.tensor([0, 8, width - 1], device=DEVICE), torch.empty(3, device=DEVICE), logits.clone()
    cross_entropy_rows_(gradient, labels, losses, True)
    right = torch.softmax(logits.double(), -1) - F.one_hot(labels, width)
    assert float((gradient - right).abs().sum(-1).max()) <= 2e-6  # of 2 at most
    torch.testing.assert_close(
        losses.double(), F.cross_entropy(logits.double(), labels, reduction="none"), rtol=5e-7, atol=0
    )


@pytest.mark.filterwarnings("ignore:overflow encountered in subtract")  # NumPy's word on it, in the interpreter
def test_extreme_logits():
    huge = 3e38
    logits = torch.tensor([[huge, 0, -1e38], [-torch.inf, 1, 2], [-huge, -huge, -huge], [1e30, 1e30, 0]], device=DEVICE)
    labels, losses, gradient = torch.tensor([0, 1, 2, 1], device=DEVICE), torch.empty(4, device=DEVICE), logits.clone()
    cross_entropy_rows_(gradient, labels, losses, True)
    torch.testing.assert_close(losses, F.cross_entropy(logits, labels, reduction="none"))
    torch.testing.assert_close(gradient, torch.softmax(logits, -1) - F.one_hot(labels, 3))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's word on it, in the interpreter
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_a_logit_that_is_no_number_shows(bad):
    logits = torch.zeros(2, 5, device=DEVICE)
    logits[0, 3], losses = bad, torch.empty(2, device=DEVICE)
    cross_entropy_rows_(logits, torch.tensor([0, 0], device=DEVICE), losses, True)
    assert torch.isnan(losses[0]) and torch.isfinite(losses[1])
    assert torch.isnan(logits[0]).any() and torch.isfinite(logits[1]).all()


def test_without_a_gradient_logits_stay():
    logits = torch.randn(4, 50, device=DEVICE)
    before, labels = logits.clone(), torch.tensor([1, IGNORE, 49, 0], device=DEVICE)
    losses = torch.empty(4, device=DEVICE)
    cross_entropy_rows_(logits, labels, losses, False)
    assert torch.equal(logits, before)
    torch.testing.assert_close(losses, F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none"))


@pytest.mark.parametrize("n", [0, 1, 70])
def test_nothing_counts(n):
    rows, weight, labels = inputs(n, 12, 31)
    for value in outcome(rows, weight, torch.full_like(labels, IGNORE)):
        assert not value.any()


def test_ignored_rows_have_no_gradient_and_do_not_matter(monkeypatch):
    in_chunks_of(monkeypatch, 16)
    rows, weight, labels = inputs(70, 12, 31)
    counts = labels != IGNORE
    loss, d_rows, _ = outcome(rows, weight, labels)
    assert not d_rows[~counts].any() and bool(d_rows[counts].any(-1).all())
    other = torch.where(counts[:, None], rows, 9.0).detach().requires_grad_()
    assert torch.equal(outcome(other, weight, labels)[0], loss)


@pytest.mark.parametrize("label", [-1, 31, -101, 1 << 40])
def test_a_label_outside_the_vocabulary(label):
    rows, weight, labels = inputs(4, 12, 31, ignored=0.0)
    labels[2] = label
    if DEVICE.type == "cpu":
        with pytest.raises(IndexError, match=rf"row 2 has the label {label}; 0 to 30 "):
            linear_cross_entropy(rows, weight, labels)
    logits, losses = (rows @ weight.T).detach(), torch.empty(4, device=DEVICE)
    cross_entropy_rows_(logits, labels, losses, True)  # where nothing can raise
    assert torch.isnan(losses).tolist() == torch.isnan(logits).all(-1).tolist() == [False, False, True, False]
    assert bool(torch.isfinite(logits[[0, 1, 3]]).all())


def test_refuses_what_it_cannot_compute():
    rows, weight, labels = inputs(4, 12, 31)
    with pytest.raises(ValueError, match=r"\[4, 11\], \[31, 12\], \[4\]"):
        linear_cross_entropy(rows[:, :11], weight, labels)
    with pytest.raises(ValueError, match=r"\[4, 12\], \[31, 12\], \[3\]"):
        linear_cross_entropy(rows, weight, labels[:3])
    with pytest.raises(ValueError, match="float64"):
        linear_cross_entropy(rows.double(), weight.double(), labels)
    with pytest.raises(ValueError, match=r"torch\.bfloat16, torch\.float32, torch\.int64"):
        linear_cross_entropy(rows.bfloat16(), weight, labels)
    with pytest.raises(ValueError, match="int32"):
        linear_cross_entropy(rows, weight, labels.int())
    with pytest.raises(ValueError, match="one device"):
        linear_cross_entropy(rows, weight.to("meta"), labels)


def test_any_strides():
    rows, weight, labels = inputs(33, 12, 31)
    case = [rows.detach().t().contiguous().t(), weight.detach().repeat(1, 2)[:, :12], labels.repeat_interleave(2)[::2]]
    assert not any(side.is_contiguous() for side in case)
    case = [case[0].requires_grad_(), case[1].requires_grad_(), case[2]]
    assert_near(outcome(*case), truth(*case))


@pytest.mark.parametrize(("d_rows", "d_weight"), [(True, False), (False, True), (False, False)])
def test_what_needs_no_gradient_costs_nothing(monkeypatch, d_rows, d_weight):
    rows, weight, _ = case = inputs(70, 24, 97)
    rows.requires_grad_(d_rows), weight.requires_grad_(d_weight)
    shapes, original = [], kernel._product

    def recorded(total, a, b, add):
        shapes.append(tuple(total.shape))
        original(total, a, b, add)

    monkeypatch.setattr(kernel, "_product", recorded)
    loss, (right, *gradients) = linear_cross_entropy(*case), truth(*case)
    assert_near([loss], [right])
    assert shapes == [(70, 24)] * d_rows + [(97, 24)] * d_weight
    assert loss.requires_grad is (d_rows or d_weight)
    if loss.requires_grad:
        loss.backward()
    for side, wanted, gradient in zip((rows, weight), (d_rows, d_weight), gradients, strict=True):
        assert (side.grad is not None) is wanted
        if wanted:
            assert_near([side.grad], [gradient])
    with torch.no_grad():
        assert linear_cross_entropy(*case).requires_grad is False
    assert len(shapes) == d_rows + d_weight


def test_d_weight_is_summed_over_chunks_in_fp32(monkeypatch):
    """75 chunks must give what one gives; a sum that is rounded to bf16 each time would be a hundred times further off."""
    rows, weight, labels = inputs(150, 24, 97, ignored=0.0)
    case = [(4 * side).round().detach().div(4).bfloat16() for side in (rows, weight)]  # logits have no rounding to differ in
    whole = torch.ops.isoloss.linear_cross_entropy(*case, labels, True, True)[2]
    ran = in_chunks_of(monkeypatch, 2)
    parts = torch.ops.isoloss.linear_cross_entropy(*case, labels, True, True)[2]
    assert whole.dtype == parts.dtype == torch.float32 and len(ran) == 75
    assert_near([parts], [whole], 1e-5)


def test_bf16_gradients_are_rounded_once():
    rows, weight, _ = case = inputs(70, 24, 97, torch.bfloat16)
    loss, *kept = torch.ops.isoloss.linear_cross_entropy(*case, True, True)
    factor = torch.tensor(0.3, device=DEVICE)
    for gradient, wide in zip(torch.autograd.grad(loss, (rows, weight), factor), kept, strict=True):
        assert gradient.dtype == torch.bfloat16 and wide.dtype == torch.float32
        assert not torch.equal(wide, wide.bfloat16().float())
        assert torch.equal(gradient, (wide * factor).bfloat16())


def test_rows_of_a_chunk():
    vocabulary = PACK_2B["V"]
    for itemsize in (2, 4):
        assert 1024 <= rows_a_chunk(5376, vocabulary, itemsize) <= max(1024, kernel.CHUNK_BYTES // (vocabulary * itemsize))
    assert rows_a_chunk(5376, vocabulary, 2) == 1792  # three of one size
    assert rows_a_chunk(40, 331, 4) == 128
    for width in (331, 32_000, vocabulary, 50_000_000):
        most = max(1024, kernel.CHUNK_BYTES // (width * 2))
        for rows in (1, 1023, 1025, 2163, 4325, 99_999):
            size = rows_a_chunk(rows, width, 2)
            assert size <= most and math.ceil(rows / size) == math.ceil(rows / most)
            assert size % kernel.CHUNK_MULTIPLE == 0 or size == most


def test_traces_without_a_graph_break():
    rows, weight, labels = inputs(20, 12, 31)
    compiled = torch.compile(lambda a, b: linear_cross_entropy(a + 1, b, labels) / 7, backend="aot_eager", fullgraph=True)
    theirs = torch.autograd.grad(linear_cross_entropy(rows + 1, weight, labels) / 7, (rows, weight))
    torch.testing.assert_close(torch.autograd.grad(compiled(rows, weight), (rows, weight)), theirs)


@pytest.mark.parametrize("n", [5, 0])
def test_is_a_well_behaved_custom_op(n):
    rows, weight, labels = inputs(n, 12, 31)
    gradient, dloss = torch.randn(n, 12, device=DEVICE), torch.tensor(0.5, device=DEVICE)
    for operator, arguments in (
        (torch.ops.isoloss.linear_cross_entropy.default, (rows, weight, labels, True, True)),
        (torch.ops.isoloss.linear_cross_entropy.default, (rows, weight.detach(), labels, True, False)),
        (torch.ops.isoloss.linear_cross_entropy_backward.default, (gradient, dloss, torch.bfloat16)),
    ):
        report = torch.library.opcheck(operator, arguments)
        assert set(report.values()) == {"SUCCESS"}, report


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.mem_get_info()[1] < 24 << 30, reason="needs a GPU with 24 GiB of memory"
)
def test_offsets_beyond_2_to_the_31():
    rows, vocabulary = (1 << 31) // PACK_2B["V"] + 3, PACK_2B["V"]
    logits = torch.randn(rows, vocabulary, dtype=torch.bfloat16, device="cuda")
    labels, losses = torch.arange(rows, device="cuda") * 7 % vocabulary, torch.empty(rows, device="cuda")
    tail, tail_losses = logits[-4:].clone(), torch.empty(4, device="cuda")
    cross_entropy_rows_(logits, labels, losses, True)
    cross_entropy_rows_(tail, labels[-4:].contiguous(), tail_losses, True)
    assert torch.equal(logits[-4:], tail) and torch.equal(losses[-4:], tail_losses)
