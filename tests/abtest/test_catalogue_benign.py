"""Every honest rewrite is the same function of real numbers, computes it with other rounding, and repeats itself."""

from __future__ import annotations

import copy
import dataclasses
from functools import cache

import pytest
import torch

from abtest.catalogue import Planted, cases, catalogue
from abtest.oracle import exact_arithmetic, make_exact
from abtest.probes import one_document, tricky_batch
from loop.config import Config, DataConfig, LoraConfig
from loop.run import Run
from loop.training import build

SAME, CLOSE = 1e-9, 1e-4  # relative distance in fp64 and in fp32
SAME_GRADIENT_BITS = {"recomputation", "loss_summed_backwards"}
SAME_WITH_A_FROZEN_HEAD = {"loss_in_row_blocks"}  # on a CPU: a row's product is the row's own
# On some CPUs: a product's blocks, and so its bits, depend on how many rows and columns it has, or they don't.
SAME_ON_SOME_CPUS = {"loss_of_supervised_rows", "joint_gate_up", "joint_qkv"}
L = 192
CONFIG = Config(device="cpu", dtype="float32", lora=LoraConfig(rank=4, alpha=8.0), data=DataConfig(pack_length=L))
REWRITES = {name: planted for name, planted in catalogue().items() if planted.kind == "benign"}
LEAST = {"qwen3.5-tiny": 13, "qwen3-shallow-tiny": 12}
OF_LAYERS = ("linear_", "lora_", "joint_", "norm_", "attention_", "rope_")
OTHERS = ("qwen2-tiny", "llama-tiny", "mistral-tiny")

Gradients = dict[str, torch.Tensor]
pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def untouched(model: str, method: str) -> Run:
    """A run in fp32 on the CPU whose LoRA products count: B is drawn, not zero."""
    run, _ = build(dataclasses.replace(CONFIG, model=model, method=method))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in run.optimizer.parameters.items():
            if ".lora_B." in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return run


def micro_step(run: Run) -> tuple[torch.Tensor, Gradients]:
    """Loss sum and every gradient: tricky documents, two packs when all is trained; for OTHERS one long document."""
    run.optimizer.zero_grad()
    vocabulary, packs = run.model.config.vocab_size, 1 if run.config.method == "lora" else 2
    probe = one_document(L, vocabulary, 5) if run.config.model in OTHERS else tricky_batch(L, packs, vocabulary, seed=5)
    loss = run.micro_step(run, probe, probe.supervised_tokens)
    return loss, {name: gradient.clone() for name, gradient in run.optimizer.gradients().items()}  # fails where one is None


def exact_micro_step(run: Run) -> tuple[torch.Tensor, Gradients]:
    """The same in fp64."""
    with exact_arithmetic(make_exact(run)):
        return micro_step(run)


@cache
def reference(model: str, method: str) -> tuple[tuple[torch.Tensor, Gradients], tuple[torch.Tensor, Gradients]]:
    """Loss and gradients without a rewrite, in fp32 and in fp64."""
    run = copy.deepcopy(untouched(model, method))
    return micro_step(run), exact_micro_step(run)


def distances(one: Gradients, other: Gradients) -> dict[str, float]:
    """Every parameter's relative distance of gradients."""
    assert one.keys() == other.keys()
    return {name: float((one[name].double() - other[name]).norm() / other[name].norm()) for name in other}


def assert_close(gradients: Gradients, model: str, method: str) -> None:
    """To the reference's in fp32; where the reference is far from the truth (dt_bias), by as much as it is."""
    (_, own), (_, truth) = reference(model, method)
    error = distances(own, truth)
    assert all(distance < CLOSE + 2 * error[name] for name, distance in distances(gradients, own).items())


def planted_run(planted: Planted, model: str, method: str) -> Run:
    reason = planted.eligible(untouched(model, method))
    if reason:
        pytest.skip(reason)
    run = copy.deepcopy(untouched(model, method))
    cases(planted)[0].apply(run)
    return run


@pytest.mark.parametrize("model", LEAST)
@pytest.mark.parametrize(("name", "method"), [(name, method) for name, p in REWRITES.items() for method in p.methods])
def test_is_the_same_function_with_other_rounding_and_repeats_itself(model, name, method):
    (loss, gradients), (exact_loss, exact_gradients) = reference(model, method)
    may_be_same = SAME_GRADIENT_BITS | SAME_ON_SOME_CPUS | (SAME_WITH_A_FROZEN_HEAD if method == "lora" else set())
    run = planted_run(REWRITES[name], model, method)

    once, again = micro_step(run), micro_step(run)
    assert torch.equal(once[0], again[0])
    assert all(torch.equal(gradient, again[1][key]) for key, gradient in once[1].items())
    assert_close(once[1], model, method)
    assert float(abs(once[0] - loss) / loss) < CLOSE
    assert name in may_be_same or any(not torch.equal(gradient, gradients[key]) for key, gradient in once[1].items())

    truth = exact_micro_step(run)
    assert truth[0].dtype == torch.float64
    assert float(abs(truth[0] - exact_loss) / exact_loss) < SAME
    assert max(distances(truth[1], exact_gradients).values()) < SAME


@pytest.mark.parametrize("model", OTHERS)
@pytest.mark.parametrize("name", [name for name in REWRITES if name.startswith(OF_LAYERS)])
def test_fits_the_layers_of_other_dense_models(model, name):
    """Biases in q, k and v (Qwen2), a sliding window shorter than the document (Mistral)."""
    run = planted_run(REWRITES[name], model, "lora")
    assert_close(micro_step(run)[1], model, "lora")


@pytest.mark.parametrize("model", LEAST)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_enough_of_them_are_eligible(model, method):
    run = untouched(model, method)
    assert sum(method in planted.methods and planted.eligible(run) is None for planted in REWRITES.values()) >= LEAST[model]


def test_a_layer_that_is_run_again_finds_nothing_of_the_first_time():
    """Recomputation stops half-way through a layer, with some of a joint product's results not fetched."""
    run = planted_run(REWRITES["joint_qkv"], "qwen3-shallow-tiny", "lora")
    plain = micro_step(run)
    REWRITES["recomputation"].plant(run, "all", 0.0)
    again = micro_step(run)
    assert torch.equal(plain[0], again[0]) and all(torch.equal(g, again[1][name]) for name, g in plain[1].items())
