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
from kernels.full_ft_linear import OPTIMIZATION, patch
from kernels.full_ft_linear.embedding import MainGradEmbedding
from kernels.full_ft_linear.kernel import MainGradLinear, SharedLinears, weight_gradient
from kernels.full_ft_linear.patch import apply, eligible
from kernels.shared_input import KINDS
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


# Sums of what nearly cancels: half an ulp in stock's own weights moves them as far as that.
CANCELLING = ("A_log", "dt_bias", "in_proj_a.weight")


@pytest.mark.parametrize("joined", [True, False], ids=["joined", "one by one"])
@pytest.mark.parametrize("checkpointing", [True, False], ids=["recomputed", "kept"])
@pytest.mark.parametrize(
    ("model", "dtype"),
    [("qwen3.5-shallow-tiny", "float32"), ("qwen3.5-shallow-tiny", "bfloat16"), ("qwen2-tiny", "bfloat16")],
)
def test_a_model_s_gradients_beside_stock_s(model, dtype, checkpointing, joined, monkeypatch):
    """Layers of one input add their gradients to dx without rounding in between; one by one they have stock's bits."""
    if not joined:
        monkeypatch.setattr(patch, "groups", lambda members: [])
    losses, stock = gradients_of(run_of(model, dtype, checkpointing))
    run = run_of(model, dtype, checkpointing)
    before = dict(run.model.named_parameters())
    assert OPTIMIZATION.eligible(run) is None
    OPTIMIZATION.apply(run)
    after = dict(run.model.named_parameters())
    assert list(after) == list(before) and all(after[name] is parameter for name, parameter in before.items())
    assert isinstance(run.model.lm_head, MainGradLinear) and run.model.training
    assert type(run.model.get_input_embeddings()) is MainGradEmbedding
    shared = {module.shared for module in run.model.modules() if isinstance(module, MainGradLinear)} - {None}
    assert bool(shared) is joined
    own, ours = gradients_of(run)
    assert own == losses and not any(one.waiting or one.input is not None for one in shared)
    for name, want in stock.items():
        if dtype == "bfloat16" and not joined and "embed_tokens" not in name:  # on a CPU only what is tied rounds otherwise
            assert torch.equal(ours[name], want), name
        else:
            ulps = 300 if name.endswith(CANCELLING) and dtype == "float32" else 8
            assert (ours[name] - want).norm() <= ulps * ROUNDING[run.dtype] * want.norm(), name
    assert eligible(run) is not None and "no plain nn.Linear" in eligible(run)


def test_which_layers_are_joined():
    run = run_of("qwen3.5-shallow-tiny", "float32", False)
    apply(run)
    found: dict[SharedLinears, list[str]] = {}
    for name, module in run.model.named_modules():
        if isinstance(module, MainGradLinear) and module.shared is not None:
            found.setdefault(module.shared, []).append(name.rpartition(".")[2])
    assert {frozenset(names) for names in found.values()} == set(KINDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("used", [(0, 1, 2), (2, 0), (1,)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_joined_layers_beside_fp64(dtype, used, bias):
    """Of some of the outputs, in any order: dx is their sum, and a layer that nobody used has no gradient."""
    torch.manual_seed(3)
    plain = [nn.Linear(24, out, bias=bias, dtype=dtype) for out in (40, 8, 16)]
    parameters = {f"{i}.{name}": p for i, layer in enumerate(plain) for name, p in layer.named_parameters()}
    optimizer = MasterAdamW(parameters, OptimConfig(), 1)
    layers = [MainGradLinear(layer, optimizer) for layer in plain]
    SharedLinears(layers)
    x, dys = normal(2, 9, 24, dtype=dtype).requires_grad_(), [normal(2, 9, len(layer.weight), seed=7) for layer in plain]
    outputs = [layer(x) for layer in layers]
    assert len({y.grad_fn for y in outputs}) == 1
    sum((outputs[i].float() * dys[i]).sum() for i in used).backward()
    truth = sum((dys[i].to(dtype).double() @ plain[i].weight.double() for i in used), torch.zeros(2, 9, 24).double())
    one_by_one = sum((dys[i].to(dtype) @ plain[i].weight for i in used), torch.zeros(2, 9, 24, dtype=dtype))
    error, theirs = ((dx.double() - truth).norm().item() for dx in (x.grad, one_by_one))
    assert error <= 1.1 * theirs + ROUNDING[dtype] * truth.norm()
    for i, layer in enumerate(plain):
        assert torch.equal(outputs[i], layer(x))
        own = optimizer.gradients()[f"{i}.weight"]
        if i not in used:
            assert own is None
            continue
        want = dys[i].to(dtype).double().flatten(0, 1).t() @ x.detach().double().flatten(0, 1)
        assert (own.double() - want).norm() <= 4 * ROUNDING[dtype] * want.norm()


def test_a_copy_of_joined_layers_is_joined_to_itself():
    run = run_of("qwen3.5-shallow-tiny", "float32", False)
    apply(run)
    twin = copy.deepcopy(run.model)
    for mine, theirs in zip(run.model.modules(), twin.modules(), strict=True):
        if isinstance(mine, MainGradLinear) and mine.shared is not None:
            assert theirs.shared is not mine.shared and theirs in theirs.shared.members


# The embedding

IDS = torch.tensor([[3, 3, 0, 7], [7, 3, 1, 3]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding", [None, 3], ids=["all count", "padding"])
@pytest.mark.parametrize("placed", [True, False], ids=["placed", "anywhere"])
def test_rows_are_added_in_fp32_over_two_micro_steps(dtype, padding, placed):
    table = nn.Embedding(9, 12, padding_idx=padding, dtype=dtype)
    optimizer = MasterAdamW({"table": table.weight}, OptimConfig(), 1)
    own, [master] = MainGradEmbedding(table, optimizer), optimizer.masters.values()
    place, truth = torch.full((9, 12), torch.nan), torch.zeros(9, 12, dtype=torch.float64)
    with optimizer.deferring({master: place} if placed else None):
        for seed in range(2):
            dy = normal(2, 4, 12, seed=seed, dtype=dtype)
            out = own(IDS)
            assert torch.equal(out, table(IDS)) and out.requires_grad
            out.backward(dy)
            rows = dy.double().flatten(0, 1) * (IDS.flatten() != (-1 if padding is None else padding))[:, None]
            truth.index_add_(0, IDS.flatten(), rows)
    assert (master.grad is place) is placed and master.grad.dtype == torch.float32
    torch.testing.assert_close(master.grad.double(), truth, rtol=1e-6, atol=1e-6)
    assert dtype == torch.float32 or table.weight.grad is None


def test_rows_go_where_a_head_has_left_its_gradient():
    """As of a tied weight, whose head comes first in backward."""
    table = nn.Embedding(9, 12)
    optimizer = MasterAdamW({"table": table.weight}, OptimConfig(), 1)
    own, held = MainGradEmbedding(table, optimizer), normal(9, 12, seed=4)
    optimizer.collector(table.weight).grad = before = held.clone()
    own(IDS).sum().backward()
    assert optimizer.collector(table.weight).grad is before
    torch.testing.assert_close(before, held + torch.bincount(IDS.flatten(), minlength=9)[:, None].float().expand(9, 12))


@pytest.mark.parametrize("padding", [None, 3], ids=["all count", "padding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_released_optimizer_leaves_the_table_s_gradient_to_autograd(dtype, padding):
    table = nn.Embedding(9, 12, padding_idx=padding, dtype=dtype)
    optimizer, dy = MasterAdamW({"table": table.weight}, OptimConfig(), 1), normal(2, 4, 12, dtype=dtype)
    own = MainGradEmbedding(table, optimizer)
    optimizer.release()
    gradients = [torch.autograd.grad(layer(IDS), table.weight, dy)[0] for layer in (own, table)]
    assert torch.equal(*gradients) and repr(own) == repr(table).replace("Embedding", "MainGradEmbedding")


def test_hooks_on_an_embedding_come_along_and_can_be_taken_off():
    run, seen = small_run(torch.float32, False), []
    handle = run.model.embed.register_forward_hook(lambda module, arguments, output: seen.append(output))
    apply(run)
    backward(run, micro_steps=1)
    assert type(run.model.embed) is MainGradEmbedding and len(seen) == 1
    handle.remove()
    backward(run, micro_steps=1)
    assert len(seen) == 1


@pytest.mark.parametrize("kind", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
def test_an_embedding_that_does_more_stays(kind):
    run = small_run(torch.float32, False)
    run.model.embed = nn.Embedding(19, 12, _weight=run.model.embed.weight, **kind)
    run.model.embed.weight = run.model.head.weight
    apply(run)
    assert type(run.model.embed) is nn.Embedding


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
    assert kinds == {"embed": MainGradEmbedding, "inner": nn.Linear, "twice": nn.Linear, "head": MainGradLinear}
    frozen = small_run(torch.float32, False)
    for parameter in frozen.model.parameters():
        parameter.requires_grad_(False)
    assert "no plain nn.Linear" in eligible(frozen)
