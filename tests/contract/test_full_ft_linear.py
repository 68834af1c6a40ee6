"""full_ft_linear: the product against fp64, the way into the optimizer's sum, and the swap on a model beside stock."""

from __future__ import annotations

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abtest.opcheck import check_op
from kernels.contract import Workload
from kernels.full_ft_linear import OPTIMIZATION
from kernels.full_ft_linear.kernel import MainGradLinear, weight_gradient
from kernels.full_ft_linear.patch import apply, eligible
from loop import lora
from loop.batch import IGNORE, PackedBatch
from loop.config import Config, LoraConfig, OptimConfig
from loop.model import cross_entropy_head, load_model, plain_micro_step, trainable
from loop.optim import MasterAdamW
from loop.run import Run
from loop.training import accumulate

CPU = torch.device("cpu")
VOCABULARY = 128
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}


def normal(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("held", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 5), (130, 3, 1), (77, 31, 65)], ids=str)
def test_output_and_gradients_are_as_close_to_fp64_as_stock_s(shape, held):
    workload = Workload("case", dict(zip(("T", "D_in", "D_out"), shape, strict=True)) | {"held": held}, "float32")
    report = check_op(OPTIMIZATION.op, workload, CPU)
    assert report.passed, report.verdict.reason
    assert {q.name for q in report.quantities} == {"output 0", "d x", "d master"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_the_product_is_added_in_place_and_in_fp32(dtype, contiguous):
    dy, x = normal(29, 2 * 13, dtype=dtype), normal(11, 29, seed=1, dtype=dtype).t()
    dy, x = dy[:, ::2], x
    if contiguous:
        dy, x = dy.contiguous(), x.contiguous()
    wide = torch.promote_types(dtype, torch.float32)
    held = normal(13, 11, seed=2).to(wide)
    truth = held.double() + dy.double().t() @ x.double()
    first, before = weight_gradient(dy, x), held.clone()
    assert first.dtype == wide and first.shape == (13, 11)
    into = torch.full_like(held, torch.nan)
    assert weight_gradient(dy, x, into=into) is into and torch.equal(into, first)
    assert weight_gradient(dy, x, held, into) is held and torch.equal(into, first)
    assert torch.equal(held, before) is False
    torch.testing.assert_close(first.double() + before.double(), truth, rtol=0, atol=0.1 if dtype != wide else 1e-5)
    torch.testing.assert_close(held.double(), truth, rtol=0, atol=0.1 if dtype != wide else 1e-5)
    if dtype in (torch.bfloat16, torch.float16):  # one rounding to the inputs' dtype, as autograd's gradient has, none after
        assert torch.equal(first, (dy.t() @ x).float()) and torch.equal(held, before + first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="products of bf16 with an fp32 result are CUDA's")
@pytest.mark.parametrize("shape", [(5376, 2048, 512), (77, 31, 65), (64, 6144, 2048)], ids=str)
def test_on_cuda_no_product_is_rounded_to_bf16(shape):
    T, D, O = shape
    dy, x = (normal(T, n, seed=n, dtype=torch.bfloat16).cuda() for n in (O, D))
    held = normal(O, D, seed=3).cuda()
    truth = held.double() + dy.double().t() @ x.double()
    stock, place = held + (dy.t() @ x).float(), held.data_ptr()
    first, before = weight_gradient(dy, x), held.clone()
    total = weight_gradient(dy, x, held)
    assert total is held and held.data_ptr() == place and first.dtype == torch.float32
    into = torch.empty_like(first)
    assert weight_gradient(dy, x, into=into) is into and torch.equal(into, first)
    error = (total.double() - truth).abs().max()
    assert error < 0.05 * (stock.double() - truth).abs().max()
    assert (before.double() + first.double() - truth).abs().max() < 0.05 * (stock.double() - truth).abs().max()


class Tied(nn.Module):
    """An embedding whose weight is also the head's, a layer with a bias, and one that is called twice."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(19, 12, dtype=dtype)
        self.inner = nn.Linear(12, 12, dtype=dtype)
        self.twice = nn.Linear(12, 12, bias=False, dtype=dtype)
        self.head = nn.Linear(12, 19, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.inner(self.embed(ids)).tanh()
        return self.head(self.twice(self.twice(hidden).tanh()))


def small_run(dtype: torch.dtype, swapped: bool) -> SimpleNamespace:
    model = Tied(dtype)
    run = SimpleNamespace(model=model, optimizer=MasterAdamW(trainable(model), OptimConfig(warmup_steps=0), 4))
    if swapped:
        assert eligible(run) is None
        apply(run)
        assert sum(isinstance(module, MainGradLinear) for module in model.modules()) == 3
    return run


def learn(model: nn.Module, micro_steps: int) -> None:
    for seed in range(micro_steps):
        ids = torch.randint(19, (2, 9), generator=torch.Generator().manual_seed(seed))
        logits = model(ids).flatten(0, 1)
        F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), ids.flatten()).backward()


def backward(run: SimpleNamespace, micro_steps: int = 2) -> dict[str, Tensor]:
    """The accumulated gradients of so many micro-steps, by name."""
    learn(run.model, micro_steps)
    return {name: gradient.clone() for name, gradient in run.optimizer.gradients().items()}


def fp64_gradients(dtype: torch.dtype, micro_steps: int = 2) -> dict[str, Tensor]:
    model = Tied(dtype).double()
    learn(model, micro_steps)
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tied_and_reused_weights_over_two_micro_steps(dtype):
    ours, stock, truth = backward(small_run(dtype, True)), backward(small_run(dtype, False)), fp64_gradients(dtype)
    assert ours.keys() == stock.keys() == truth.keys()
    for name, want in truth.items():
        assert ours[name].dtype == torch.float32
        error, theirs = ((side[name].double() - want).norm() / want.norm() for side in (ours, stock))
        assert error <= 1.5 * theirs + ROUNDING[torch.float32], f"{name}: {error} against stock's {theirs}"
        assert error < 40 * ROUNDING[dtype], name
    assert torch.equal(ours["inner.bias"], stock["inner.bias"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_can_be_given_its_place(dtype):
    """As a graph does that wants it at a fixed address: of a weight that is used twice, too, and with the same bits."""
    run, plain, names = small_run(dtype, True), small_run(dtype, True), ("inner.weight", "twice.weight")
    masters = run.optimizer.masters
    places = {masters[name]: torch.full_like(masters[name], torch.nan, requires_grad=False) for name in names}
    with run.optimizer.deferring(places):
        learn(run.model, 1)
        assert all(masters[name].grad is places[masters[name]] for name in names)
    learn(plain.model, 1)
    for name in names:
        assert torch.equal(masters[name].grad, plain.optimizer.masters[name].grad)
        assert run.optimizer.place(masters[name]) is None  # no longer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_clear_the_sum_and_go_on(dtype):
    ours, stock = small_run(dtype, True), small_run(dtype, False)
    for step in range(3):
        for run in (ours, stock):
            backward(run)
            run.optimizer.step(step)
        assert set(ours.optimizer.gradients().values()) == {None}
        assert all(p.grad is None for p in ours.model.parameters())
    for (name, mine), theirs in zip(ours.optimizer.masters.items(), stock.optimizer.masters.values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-3 if dtype == torch.bfloat16 else 1e-5, msg=name)
    first = backward(ours, micro_steps=1)
    ours.optimizer.zero_grad()
    again = backward(ours, micro_steps=1)
    assert all(torch.equal(value, again[name]) for name, value in first.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_released_optimizer_leaves_gradients_to_autograd(dtype):
    ours, stock = small_run(dtype, True), small_run(dtype, False)
    for run in (ours, stock):
        run.optimizer.release()
        learn(run.model, 1)
    for (name, mine), theirs in zip(ours.model.named_parameters(), stock.model.parameters(), strict=True):
        assert mine.grad.dtype == dtype and torch.equal(mine.grad, theirs.grad), name
    if dtype != torch.float32:
        assert set(ours.optimizer.gradients().values()) == {None}
    ours.optimizer = MasterAdamW(trainable(ours.model), OptimConfig(), 4)  # takes over, as where optimizers are exchanged
    ours.model.zero_grad()
    taken, truth = backward(ours), fp64_gradients(dtype)
    for name, want in truth.items():
        assert (taken[name].double() - want).norm() < 40 * ROUNDING[dtype] * want.norm(), name


def test_a_copy_of_the_model_keeps_its_gradients_to_itself():
    run = small_run(torch.float32, True)
    twin = copy.deepcopy(run.model)
    ids = torch.arange(10)[None]
    twin(ids).square().sum().backward()
    assert all(p.grad is not None for p in twin.parameters())
    assert set(run.optimizer.gradients().values()) == {None}
    held = weakref.ref(run.optimizer)
    run.optimizer = None
    gc.collect()
    assert held() is None, "the layers keep it alive"
    run.model(ids).square().sum().backward()
    for mine, theirs in zip(run.model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_what_needs_no_gradient_gets_none():
    run = small_run(torch.float32, True)
    layer, x = run.model.inner, normal(4, 6, 12).requires_grad_()
    layer.weight.requires_grad_(False)
    layer(x.transpose(0, 1)).sum().backward()  # rows that are not contiguous
    assert run.optimizer.gradients()["inner.weight"] is None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(4, 6, 12))
    layer.weight.requires_grad_(True)
    with torch.no_grad():
        assert not layer(x).requires_grad
    layer(x.detach()).sum().backward()
    torch.testing.assert_close(run.optimizer.gradients()["inner.weight"], x.detach().sum((0, 1)).expand(12, 12))


def test_a_backward_can_be_repeated():
    run = small_run(torch.bfloat16, True)
    loss = run.model(torch.arange(8)[None]).float().square().mean()
    loss.backward(retain_graph=True)
    first = {name: value.clone() for name, value in run.optimizer.gradients().items()}
    loss.backward()
    assert all(torch.equal(run.optimizer.gradients()[name], 2 * value) for name, value in first.items())


def run_of(model: str, dtype: str, checkpointing: bool, method: str = "full") -> Run:
    config = Config(model=model, device="cpu", dtype=dtype, method=method, gradient_checkpointing=checkpointing)
    built = load_model(config, VOCABULARY)
    if method == "lora":
        lora.attach(built, LoraConfig(rank=2), seed=0)
    optimizer = MasterAdamW(trainable(built), OptimConfig(), 1)
    return Run(config, CPU, getattr(torch, dtype), built, cross_entropy_head, plain_micro_step, optimizer)


def batch_of(*lengths: int) -> PackedBatch:
    ids = torch.randint(VOCABULARY, (1, sum(lengths)), generator=torch.Generator().manual_seed(sum(lengths)))
    ends = torch.tensor((0, *lengths)).cumsum(0)
    labels = ids.roll(-1, dims=1)
    labels[0, ends[1:] - 1] = IGNORE
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return PackedBatch(ids, labels, positions, ends.to(torch.int32), sum(lengths), int((labels != IGNORE).sum()))


def gradients_of(run: Run) -> tuple[list[float], dict[str, Tensor]]:
    batches = [batch_of(20, 3, 18), batch_of(41, 6)]
    losses = accumulate(run, batches, sum(batch.supervised_tokens for batch in batches))
    return losses, run.optimizer.gradients()


@pytest.mark.parametrize("checkpointing", [True, False], ids=["recomputed", "kept"])
@pytest.mark.parametrize(
    ("model", "dtype"),
    [("qwen3.5-shallow-tiny", "float32"), ("qwen3.5-shallow-tiny", "bfloat16"), ("qwen2-tiny", "bfloat16")],
)
def test_a_model_s_gradients_beside_stock_s(model, dtype, checkpointing):
    losses, stock = gradients_of(run_of(model, dtype, checkpointing))
    run = run_of(model, dtype, checkpointing)
    before = dict(run.model.named_parameters())
    assert OPTIMIZATION.eligible(run) is None
    OPTIMIZATION.apply(run)
    after = dict(run.model.named_parameters())
    assert list(after) == list(before) and all(after[name] is parameter for name, parameter in before.items())
    assert isinstance(run.model.lm_head, MainGradLinear) and run.model.training
    own, ours = gradients_of(run)
    assert own == losses
    for name, want in stock.items():
        if dtype == "bfloat16" and "embed_tokens" not in name:  # on a CPU only what is tied rounds otherwise
            assert torch.equal(ours[name], want), name
        else:
            assert (ours[name] - want).norm() <= 8 * ROUNDING[run.dtype] * want.norm(), name
    assert eligible(run) is not None and "no plain nn.Linear" in eligible(run)


def test_refuses_with_the_reason():
    assert "trains adapters" in eligible(run_of("llama-tiny", "float32", False, "lora"))
    run = small_run(torch.float32, False)
    run.optimizer.release()
    assert eligible(run) == "Tied has no plain nn.Linear that trains"
    run.optimizer = SimpleNamespace()
    assert eligible(run) == "SimpleNamespace takes gradients from autograd alone"


def test_what_is_watched_or_frozen_stays_as_it_is():
    run = small_run(torch.float32, False)
    run.model.inner.register_forward_hook(lambda module, arguments, output: output)
    run.model.twice.weight.register_hook(lambda gradient: 2 * gradient)
    apply(run)
    kinds = {name: type(module) for name, module in run.model.named_children()}
    assert kinds == {"embed": nn.Embedding, "inner": nn.Linear, "twice": nn.Linear, "head": MainGradLinear}
    frozen = small_run(torch.float32, False)
    for parameter in frozen.model.parameters():
        parameter.requires_grad_(False)
    assert "no plain nn.Linear" in eligible(frozen)
