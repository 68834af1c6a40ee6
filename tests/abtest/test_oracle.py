"""The truth that arms are compared with: really fp64, really unpacked, and able to see a leak."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch
from tiny import gradients, tiny, tricky
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from abtest import oracle
from abtest.catalogue import find
from abtest.gradients import pooled
from abtest.oracle import exact_arithmetic, exact_gradients, make_exact, recurrence, unpacked
from abtest.probes import Probe, one_document, probes, supervised, tricky_batch
from loop.batch import IGNORE
from loop.delta_net import CHUNK, PackedDeltaNet
from loop.model import forward_body, trainable
from loop.run import Run
from loop.training import accumulate

AGREES, LEAKS = 1e-5, 1e-2  # relative distance of gradients
Gradients = dict[str, torch.Tensor]


def exact(**changes) -> Run:
    run, _ = tiny(**changes)
    make_exact(run)
    return run


def true_gradients(run: Run, probe: Probe) -> Gradients:
    return {name: gradient.clone() for name, gradient in exact_gradients(run, probe, torch.float64).items()}


@pytest.fixture(scope="module")
def run(one_thread) -> Run:
    """The oracle of an fp32 run."""
    return exact()


@pytest.fixture(scope="module")
def own(one_thread) -> list[Probe]:
    """A tricky probe, two rows, and two micro-steps."""
    made, dataset = tiny()
    return probes(dataset, 4, 1, made.model.config.vocab_size)[1:]


@pytest.fixture(scope="module")
def truth(run, own) -> list[Gradients]:
    return [true_gradients(run, probe) for probe in own]


def of_probe(run: Run, probe: Probe) -> Gradients:
    run.optimizer.zero_grad()
    accumulate(run, list(probe), supervised(probe))
    return run.optimizer.gradients()


def distance(found: Mapping[str, torch.Tensor], truth: Gradients) -> float:
    """The largest relative distance of any parameter's gradient from the oracle's."""
    assert found.keys() == truth.keys()
    return max(float((found[name].double() - g).norm() / g.norm()) for name, g in truth.items())


class Widths(TorchDispatchMode):
    """Collects the floating dtypes of everything that is computed while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[torch.dtype, str] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, list | tuple) else (out,):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                self.seen.setdefault(value.dtype, str(function))
        return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_every_operation_of_the_oracle_is_fp64(dtype, method, own):
    run = exact(dtype=dtype, method=method, gradient_checkpointing=True)
    assert not run.model.is_gradient_checkpointing  # a recomputed forward would be narrower
    with Widths() as widths:
        exact_gradients(run, own[0], torch.float64)
    assert set(widths.seen) == {torch.float64}, widths.seen
    with Widths() as widths:
        forward_body(run.model, own[0][0])
    assert torch.float32 in widths.seen  # what the same model does when it is not asked for more


def test_the_gradient_is_the_slope_that_only_fp64_can_measure(run, own, truth):
    """Central differences over 2e-5: in fp32 the loss has no digit left to take them from."""
    parameters, (batch,) = trainable(run.model), own[0]
    generator = torch.Generator().manual_seed(3)
    along = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in parameters.items()}

    @torch.no_grad()
    def loss_at(distance: float) -> float:
        for name, parameter in parameters.items():
            parameter.add_(distance * along[name])
        with exact_arithmetic(torch.float64):
            losses = [run.loss_head(run.model, forward_body(run.model, rows), rows) for rows in unpacked(batch)]
        for name, parameter in parameters.items():
            parameter.sub_(distance * along[name])
        return float(sum(losses)) / batch.supervised_tokens

    slope = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
    assert slope == pytest.approx(sum(float((truth[0][n] * along[n]).sum()) for n in along), rel=1e-6)


def test_the_packed_reference_agrees(own, truth):
    reference, _ = tiny()
    assert max(distance(of_probe(reference, probe), exact) for probe, exact in zip(own, truth, strict=True)) < AGREES


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_bf16_runs_oracle_has_the_gradients_of_its_rounded_weights(method, own):
    """Those of an fp32 run that holds the same values: nothing is rounded to bf16 on the way, nor swallowed by masters."""
    low, _ = tiny(dtype="bfloat16", method=method)
    values = {name: p.detach().double() for name, p in low.model.named_parameters()}
    arm = of_probe(low, own[0])
    assert all(g.dtype is torch.float32 for g in arm.values())
    arm = {name: gradient.clone() for name, gradient in arm.items()}
    assert make_exact(low) is torch.float64
    high = exact(method=method)
    for name, parameter in high.model.named_parameters():
        assert torch.equal(low.model.get_parameter(name), values[name])  # raised, not changed
        parameter.data.copy_(values[name])
    found, wanted = (true_gradients(run, own[0]) for run in (low, high))
    assert all(g.dtype is torch.float64 and torch.equal(g, wanted[name]) for name, g in found.items())
    assert all(float(g.norm()) > 0 for g in found.values()) and 1e-3 < distance(arm, found) < 1


def test_only_a_large_bf16_model_is_computed_in_fp32(monkeypatch):
    monkeypatch.setattr(oracle, "FP64_PARAMETERS", 1000)
    runs = {
        dtype: tiny("qwen3-shallow-tiny", dtype=dtype, gradient_checkpointing=True)[0] for dtype in ("float32", "bfloat16")
    }
    assert {dtype: make_exact(run) for dtype, run in runs.items()} == {"float32": torch.float64, "bfloat16": torch.float32}
    low = runs["bfloat16"]
    assert low.model.is_gradient_checkpointing and all(p.dtype is torch.float32 for p in low.model.parameters())
    found = exact_gradients(low, (tricky(low, 0),), torch.float32)
    assert all(g.dtype is torch.float32 and float(g.norm()) > 0 for g in found.values())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_released_optimizer_gets_nothing_any_more(method):
    """The hooks that move a bf16 gradient to its master are gone, so that another optimizer's find it where it was."""
    low, _ = tiny("qwen3-shallow-tiny", dtype="bfloat16", method=method)
    optimizer, batch = low.optimizer, tricky(low, 0)
    held = len(optimizer.hooks)
    assert held == sum(p.dtype is torch.bfloat16 for p in optimizer.parameters.values()) > 0
    assert all(p._post_accumulate_grad_hooks for p in optimizer.parameters.values())
    before = gradients(low, batch)
    optimizer.release()
    assert not optimizer.hooks and not any(p._post_accumulate_grad_hooks for p in optimizer.parameters.values())
    low.micro_step(low, batch, batch.supervised_tokens)
    assert all(gradient is None for gradient in optimizer.gradients().values())
    for name, parameter in optimizer.parameters.items():
        assert parameter.grad.dtype is torch.bfloat16 and torch.equal(parameter.grad.float(), before[name])
    optimizer.release()  # once more changes nothing


def test_the_packing_error_is_the_worst_parameter_s_distance(run, own, truth):
    for probe, exact in zip(own, truth, strict=True):
        error, name = oracle.packing_error(run, probe, torch.float64, exact)
        assert 0 < error < 1e-12 and name in pooled({n: g.numel() for n, g in exact.items()})
    for factor, wanted in ((1.25, 0.2), (0.0, math.inf), (math.nan, math.nan)):
        first, *others = truth[0]
        wrong = truth[0] | {first: factor * truth[0][first], others[0]: 1.01 * truth[0][others[0]]}
        error, name = oracle.packing_error(run, own[0], torch.float64, wrong)
        assert error == pytest.approx(wanted, rel=1e-9, nan_ok=True) and name == first


def test_small_tensors_of_all_layers_are_one_error():
    truth = {f"layers.{i}.A_log": torch.tensor([3.0 * i, 4.0 * i]) for i in range(3)}
    off = truth | {"layers.0.A_log": torch.tensor([0.0, 1.0])}  # alone, infinitely far from zero
    assert oracle.worst_error(off, truth) == (pytest.approx(1 / math.hypot(5, 10)), "layers.*.A_log")
    assert oracle.worst_error(truth, truth) == (0.0, "")


def test_the_recurrence_is_the_delta_rule_by_hand():
    """One token: o = beta v (k . q) / sqrt(K). Two of the same key: the second write replaces the first."""
    q, k, v = (torch.randn(1, 1, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in range(3))
    beta, g = torch.full((1, 1, 1), 0.5, dtype=torch.float64), torch.full((1, 1, 1), -0.3, dtype=torch.float64)
    overlap = torch.nn.functional.cosine_similarity(q, k, dim=-1)[..., None] / 2  # sqrt(4)
    torch.testing.assert_close(recurrence(q, k, v, g, beta), 0.5 * overlap * v, rtol=1e-5, atol=0)
    twice = [torch.cat([x, x], 1) for x in (q, k)]
    values, ones = torch.cat([v, 3 * v], 1), torch.ones(1, 2, 1, dtype=torch.float64)
    out = recurrence(*twice, values, torch.cat([g, g], 1), ones)
    torch.testing.assert_close(out[:, 1:], 3 * overlap * v, rtol=1e-5, atol=0)


def test_the_chunked_delta_rule_is_the_recurrence_and_a_wrong_one_shows(run, own, monkeypatch):
    batch = one_document(100, run.model.config.vocab_size, 0)  # more than a chunk
    layers = [module for module in run.model.modules() if type(module) is PackedDeltaNet]
    for each in (batch, own[0][0]):
        error, _ = oracle.recurrence_error(run, each, torch.float64)
        assert 0 < error < 1e-9
    monkeypatch.setattr(oracle, "recurrence", lambda q, k, v, g, beta: recurrence(q, k, v, 1.01 * g, beta))
    assert oracle.recurrence_error(run, batch, torch.float64)[0] > 1e-3
    monkeypatch.setattr(oracle, "recurrence", None)
    with pytest.raises(TypeError):
        oracle.recurrence_error(run, batch, torch.float64)
    assert layers and all(type(module) is PackedDeltaNet for module in layers)
    assert oracle.recurrence_error(exact(model="qwen3-shallow-tiny"), batch, torch.float64) is None


@pytest.mark.parametrize("leak", ["state_leak:first:1", "conv_leak:first:1", "attention_leak:first:1"])
def test_a_leak_is_far_from_the_oracle(leak, own, truth):
    leaky, _ = tiny()
    find(leak).apply(leaky)
    assert distance(of_probe(leaky, own[0]), truth[0]) > LEAKS


def test_a_parameter_without_gradient_is_an_error_not_a_zero(own):
    lacking = exact()
    lacking.optimizer.parameters["spare.weight"] = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"no gradient for 1 parameters, first spare\.weight"):
        exact_gradients(lacking, own[0], torch.float64)


def test_unpacked_documents_are_rows_of_their_own(own):
    for batch in (*(batch for probe in own for batch in probe), tricky_batch(256, 2, 99, seed=0)):
        starts = [0, *torch.tensor(batch.lengths).cumsum(0).tolist()]
        ids, labels = batch.input_ids.flatten(), batch.labels.flatten()
        wanted = [(ids[a:b].tolist(), labels[a:b].tolist()) for a, b in pairwise(starts) if (labels[a:b] != IGNORE).any()]
        found = []
        for rows in unpacked(batch):
            length = rows.input_ids.shape[1]
            assert length % CHUNK == 0 and set(rows.lengths) == {length}
            assert torch.equal(rows.position_ids, torch.arange(length).expand(len(rows.input_ids), -1))
            found += list(zip(rows.input_ids.tolist(), rows.labels.tolist(), strict=True))
        padded = [-(-len(document) // CHUNK) * CHUNK - len(document) for document, _ in wanted]
        rows = [(d + [0] * more, t + [IGNORE] * more) for (d, t), more in zip(wanted, padded, strict=True)]
        assert sorted(found) == sorted(rows)
        assert sum(rows.supervised_tokens for rows in unpacked(batch)) == batch.supervised_tokens


def test_short_documents_are_not_recomputed_and_long_ones_are(own, monkeypatch):
    """By the number of forwards of a layer a backward; the gradients have the same bits."""
    run, _ = tiny(gradient_checkpointing=True)
    run.optimizer.release()
    run.optimizer = oracle.ExactGradients(run.optimizer.parameters)
    layer, forwards = run.model.get_decoder().layers[0], []
    layer.input_layernorm.register_forward_hook(lambda *_: forwards.append(1))
    batches = sum(len(list(unpacked(batch))) for batch in own[0])

    def count(**named) -> tuple[int, Gradients]:
        forwards.clear()
        found = {name: g.clone() for name, g in exact_gradients(run, own[0], torch.float32, **named).items()}
        return len(forwards), found

    (kept, one), (recomputed, other) = count(), count(together=0)
    assert (kept, recomputed) == (batches, 2 * batches)
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(RuntimeError, match="halfway"), oracle.keeping(run.model, True):
        assert not run.model.is_gradient_checkpointing
        raise RuntimeError("halfway")
    assert run.model.is_gradient_checkpointing


def test_few_positions_are_computed_at_a_time(monkeypatch):
    monkeypatch.setattr(oracle, "TOGETHER", 256)
    sizes = [(len(rows.input_ids), rows.positions) for rows in unpacked(tricky_batch(4 * 961, 1, 99, seed=0))]
    assert max(count for count, _ in sizes) == 4 and any(positions == 1024 for _, positions in sizes), sizes
    assert all(positions <= 256 or count == 1 for count, positions in sizes), sizes


def test_fp32_in_so_many_words_becomes_fp64_inside_and_only_there():
    x = torch.ones(2, dtype=torch.float64)
    for ask in (lambda: x.float(), lambda: x.to(torch.float32), lambda: torch.softmax(x, 0, dtype=torch.float32),
                lambda: torch.zeros(2, dtype=torch.float32)):  # fmt: skip
        with exact_arithmetic(torch.float64):
            assert ask().dtype is torch.float64
        with exact_arithmetic(torch.float32):
            assert ask().dtype is torch.float32
        assert ask().dtype is torch.float32


def test_tf32_is_off_inside_and_as_it_was_after():
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        for dtype in (torch.float32, torch.float64):
            with pytest.raises(ZeroDivisionError), exact_arithmetic(dtype):
                assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
                raise ZeroDivisionError
            assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
