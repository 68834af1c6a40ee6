"""linear_cross_entropy as the loss head of a run: models with tied and untied heads, full and LoRA, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn

from kernels import registry
from kernels.full_ft_linear.kernel import MainGradLinear
from kernels.linear_cross_entropy import OPTIMIZATION, kernel, main_grad
from kernels.linear_cross_entropy.main_grad import MainGradHead
from kernels.linear_cross_entropy.patch import AFTER_THE_HEAD, eligible
from kernels.supervised_logits.kernel import LEAST_ROWS
from loop import lora
from loop.batch import IGNORE, PackedBatch
from loop.config import Config, LoraConfig
from loop.model import cross_entropy_head, load_model, plain_micro_step, trainable
from loop.optim import MasterAdamW
from loop.run import Run
from loop.shapes import SHAPES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
V, LENGTH = 331, 48


def batch_of(seed: int, counting: float) -> PackedBatch:
    """Two packs of two documents each; about a part `counting` of the positions is supervised."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (2, LENGTH), generator=generator)
    labels = ids.roll(-1, dims=1).masked_fill(torch.rand(2, LENGTH, generator=generator) >= counting, IGNORE)
    labels[:, [19, LENGTH - 1]] = IGNORE
    positions = torch.cat([torch.arange(20), torch.arange(LENGTH - 20)]).repeat(2, 1)
    bounds = torch.tensor([0, 20, LENGTH, LENGTH + 20, 2 * LENGTH], dtype=torch.int32)
    return PackedBatch(ids, labels, positions, bounds, 2 * LENGTH, int((labels != IGNORE).sum()))


def built(model: str, method: str, dtype: str = "float32") -> Run:
    """A run of a named shape, its adapters adding something."""
    config = Config(model=model, method=method, device=DEVICE.type, dtype=dtype, lora=LoraConfig(rank=4, alpha=8.0))
    module = load_model(config, V)
    if method == "lora":
        lora.attach(module, config.lora, config.seed)
        for adapter in lora.adapters(module):
            nn.init.normal_(adapter.b, std=0.02, generator=torch.Generator(DEVICE).manual_seed(1))
    optimizer = MasterAdamW(trainable(module), config.optim, config.steps)
    return Run(config, DEVICE, getattr(torch, dtype), module, cross_entropy_head, plain_micro_step, optimizer)


def accumulated(run: Run, batches: list[PackedBatch]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss sums of the micro-steps, and the gradients that the optimizer has after them."""
    supervised = sum(batch.supervised_tokens for batch in batches)
    losses = [run.micro_step(run, batch.to(DEVICE), supervised) for batch in batches]
    return torch.stack(losses), {name: g for name, g in run.optimizer.gradients().items() if g is not None}


def switched_on(run: Run) -> Run:
    assert OPTIMIZATION.eligible(run) is None
    OPTIMIZATION.apply(run)
    trains = run.model.get_output_embeddings().weight.requires_grad
    assert type(run.loss_head) is MainGradHead if trains else run.loss_head is kernel.linear_cross_entropy_head
    return run


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(
    ("model", "tied"), [("qwen3.5-shallow-tiny", True), ("llama-tiny", True), ("llama-tiny", False), ("qwen3-tiny", False)]
)
def test_two_micro_steps_beside_stock(monkeypatch, model, tied, method):
    monkeypatch.setitem(SHAPES[model][1], "tie_word_embeddings", tied)
    monkeypatch.setattr(kernel, "rows_a_chunk", lambda rows, vocabulary, itemsize: 21)
    batches = [batch_of(1, 0.9), batch_of(2, 0.1)]
    assert batches[1].supervised_tokens < LEAST_ROWS < batches[0].supervised_tokens
    run = built(model, method)
    assert (run.model.get_output_embeddings().weight is run.model.get_input_embeddings().weight) is tied
    losses, gradients = accumulated(run, batches)
    own_losses, own_gradients = accumulated(switched_on(built(model, method)), batches)
    torch.testing.assert_close(own_losses, losses, rtol=1e-6, atol=0)
    assert own_gradients.keys() == gradients.keys() and any("lm_head" in n or "embed" in n for n in gradients) is (
        method == "full"
    )
    for name, gradient in gradients.items():
        assert (own_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, name


def test_a_batch_without_supervised_tokens():
    run = switched_on(built("qwen2-tiny", "full"))
    losses, gradients = accumulated(run, [batch_of(1, 0.0)])
    assert losses.tolist() == [0.0] and gradients
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tied_weight_gets_its_gradient_once(dtype):
    found = []
    for run in (built("llama-tiny", "full", dtype), switched_on(built("llama-tiny", "full", dtype))):
        weight, calls = run.model.get_output_embeddings().weight, []
        weight.register_post_accumulate_grad_hook(lambda parameter, calls=calls: calls.append(parameter))
        _, gradients = accumulated(run, [batch_of(1, 0.9), batch_of(2, 0.5)])
        assert len(calls) == 2  # one a micro-step
        found.append(gradients["model.embed_tokens.weight"])
    stock, own = found
    assert stock.dtype == own.dtype == torch.float32
    assert (own - stock).norm() <= (1e-5 if dtype == "float32" else 0.02) * stock.norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_beside_full_ft_linear_whichever_comes_first(dtype):
    """A head that full_ft_linear has swapped is still a product and no more; nothing is counted twice or lost."""
    batches, found = [batch_of(1, 0.9), batch_of(2, 0.5)], []
    for names in ([], ["full_ft_linear", "linear_cross_entropy"], ["linear_cross_entropy", "full_ft_linear"]):
        run = built("llama-tiny", "full", dtype)
        for name in names:
            assert registry.discover()[name].eligible(run) is None
            registry.discover()[name].apply(run)
        assert (type(run.model.get_output_embeddings()) is MainGradLinear) == bool(names)
        found.append(accumulated(run, batches))
    (losses, gradients), *others = found
    for own_losses, own_gradients in others:
        torch.testing.assert_close(own_losses, losses, rtol=1e-6 if dtype == "float32" else 1e-2, atol=0)
        assert own_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            error = (own_gradients[name] - gradient).norm()
            assert error <= (1e-5 if dtype == "float32" else 0.03) * gradient.norm() + 1e-8, name


def test_the_weight_s_gradient_is_summed_in_fp32_and_seen_by_no_hook():
    """Nothing is left for autograd, and of a head in bf16 the sum of two micro-steps is near the truth: rounding
    each of them would be off by 2^-9."""
    run, seen = switched_on(built("qwen3-tiny", "full", "bfloat16")), []
    weight = run.model.get_output_embeddings().weight
    weight.register_hook(lambda gradient: seen.append(gradient))
    rows, labels = torch.randn(40, weight.shape[1]).bfloat16().to(DEVICE), torch.randint(V, (40,)).to(DEVICE)
    total = torch.zeros(weight.shape, dtype=torch.float64)
    for factor in (0.3, 0.7):
        loss = main_grad._Loss.apply(rows.clone().requires_grad_(), weight, labels, run.loss_head)
        (factor * loss).backward()
        _, _, gradient = torch.ops.isoloss.linear_cross_entropy(rows, weight.detach(), labels, False, True)
        total += factor * gradient.double().cpu()
    own = run.optimizer.collector(weight).grad
    assert set(seen) == {None} and weight.grad is None
    assert (own.cpu() - total).norm() < 2**-22 * total.norm()


def test_a_place_is_written_to_and_a_second_backward_adds_the_same():
    run = switched_on(built("qwen3-tiny", "full", "bfloat16"))
    weight = run.model.get_output_embeddings().weight
    collector = run.optimizer.collector(weight)
    place = torch.full(weight.shape, float("nan"), dtype=torch.float32, device=DEVICE)
    hidden = torch.randn(2, LENGTH, weight.shape[1], device=DEVICE).bfloat16().requires_grad_()
    with run.optimizer.deferring({collector: place}):
        loss = run.loss_head(run.model, hidden, batch_of(1, 0.9).to(DEVICE))
        loss.backward(retain_graph=True)
        assert collector.grad is place and place.isfinite().all()
        first = place.clone()
        loss.backward()
    assert torch.equal(collector.grad, first + first)
    with torch.no_grad():
        assert not run.loss_head(run.model, hidden, batch_of(1, 0.9).to(DEVICE)).requires_grad


@pytest.mark.parametrize("when", ["before", "between"])
def test_after_a_release_autograd_gets_it(when):
    run, stock = switched_on(built("qwen3-tiny", "full", "bfloat16")), switched_on(built("qwen3-tiny", "full", "bfloat16"))
    stock.loss_head = kernel.linear_cross_entropy_head
    stock.optimizer.release()
    if when == "before":
        run.optimizer.release()
    found = []
    for own in (run, stock):
        hidden = torch.randn(2, LENGTH, own.model.config.hidden_size, generator=torch.Generator().manual_seed(0))
        loss = own.loss_head(own.model, hidden.bfloat16().to(DEVICE).requires_grad_(), batch_of(1, 0.9).to(DEVICE))
        own.optimizer.release()
        loss.backward()
        found.append(own.model.get_output_embeddings().weight.grad)
    assert torch.equal(*found)


def test_a_weight_whose_gradient_is_watched_keeps_autograd_s_way():
    run = built("qwen3-tiny", "full")
    run.model.get_output_embeddings().weight.register_hook(lambda gradient: 2 * gradient)
    OPTIMIZATION.apply(run)
    assert run.loss_head is kernel.linear_cross_entropy_head


@pytest.mark.parametrize("size", [1, 5, 2048, 70001])
def test_adding_what_is_scaled(size):
    gradient, held = torch.randn(size, device=DEVICE), torch.randn(size, device=DEVICE)
    factor = torch.tensor(0.37, device=DEVICE)
    assert torch.equal(kernel.add_scaled(gradient, factor), gradient * factor)
    into = torch.full_like(held, float("nan"))
    assert kernel.add_scaled(gradient, factor, None, into) is into and torch.equal(into, gradient * factor)
    want = held.double() + gradient.double() * factor.double()
    assert kernel.add_scaled(gradient, factor, held) is held and (held.double() - want).abs().max() < 1e-6


def test_refuses_a_head_that_is_more_than_a_product(monkeypatch):
    run = built("llama-tiny", "full")
    head = run.model.lm_head
    handle = head.register_forward_hook(lambda module, arguments, output: output)
    assert "hooks" in eligible(run)
    handle.remove()
    head.bias = nn.Parameter(torch.zeros(V))
    assert eligible(run) == "the head has a bias"
    head.bias = None
    assert eligible(run) is None
    run.model.lm_head = nn.Sequential(head)
    assert "torch.nn.modules.container.Sequential, not a plain nn.Linear" in eligible(run)
    run.model.lm_head = head.double()
    assert "torch.float64, not one of torch.bfloat16" in eligible(run)
    monkeypatch.setattr(run.model, "get_output_embeddings", lambda: None)
    assert eligible(run) == "LlamaForCausalLM has no output head"


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT's word on it
def test_refuses_lora_on_the_head():
    run = built("llama-tiny", "full")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["lm_head"]), run.model)
    assert "the head is a peft.tuners.lora.layer.Linear, not a plain nn.Linear" in eligible(run)


@pytest.mark.parametrize("name", AFTER_THE_HEAD)
def test_refuses_logits_that_change_after_the_head(name):
    run = built("llama-tiny", "full")
    for neutral in (None, 1.0):
        setattr(run.model.config, name, neutral)
        assert eligible(run) is None
    setattr(run.model.config, name, 30.0)
    assert eligible(run) == f"the model changes its logits after the head: {name} is 30.0"


def test_refuses_another_head_s_place_and_a_box_without_triton(monkeypatch):
    run = switched_on(built("llama-tiny", "full"))
    assert eligible(run) == "another optimization already owns the loss head"
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    reason = eligible(SimpleNamespace(loss_head=cross_entropy_head, device=torch.device("cpu"), model=run.model))
    assert "TRITON_INTERPRET=1" in reason
