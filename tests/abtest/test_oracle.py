"""The truth that arms are compared with: really fp64, really unpacked, and able to see a leak."""

from __future__ import annotations

import dataclasses
import io
import math
from itertools import pairwise

import planted
import pytest
import torch
from in_process import CONFIG
from torch.utils._python_dispatch import TorchDispatchMode

from abtest import worker
from abtest.oracle import EXACT_DTYPE, exact_arithmetic, exact_gradients, make_exact, packing_error, unpacked
from abtest.probes import probe_batches, tricky_batch
from abtest.worker import Worker
from loop.batch import IGNORE
from loop.delta_net import CHUNK, PackedDeltaNet
from loop.model import forward_body, trainable
from loop.recipe import to_plain
from loop.training import accumulate

AGREES, LEAKS = 1e-5, 1e-2  # relative distance of gradients


def built(exact: bool = False, config=CONFIG) -> Worker:
    """A worker with a run whose LoRA products count: B is drawn, not zero."""
    worker = Worker(io.StringIO())
    worker.build(to_plain(config), [], exact)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in trainable(worker.run.model).items():
            if ".lora_B." in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return worker


@pytest.fixture(scope="module")
def oracle(one_thread) -> Worker:
    return built(exact=True)


@pytest.fixture(scope="module")
def batches(oracle):
    """Two real packs and a tricky one."""
    return probe_batches(oracle.dataset, 4, 1, oracle.run.model.config.vocab_size)[1:]


@pytest.fixture(scope="module")
def truth(oracle, batches):
    return [{n: g.clone() for n, g in exact_gradients(oracle.run, batch, oracle.exact).items()} for batch in batches]


def distance(worker: Worker, batch, exact: dict[str, torch.Tensor]) -> float:
    """The largest relative distance of any parameter's gradient from the oracle's."""
    worker.run.optimizer.zero_grad()
    accumulate(worker.run, [batch], batch.supervised_tokens)
    gradients = worker.run.optimizer.gradients()
    return max(float((gradients[name].double() - g).norm() / g.norm()) for name, g in exact.items())


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


def test_every_operation_of_the_oracle_is_fp64(oracle, batches):
    with Widths() as widths:
        exact_gradients(oracle.run, batches[0], oracle.exact)
    assert set(widths.seen) == {torch.float64}, widths.seen
    with Widths() as widths:
        forward_body(oracle.run.model, batches[0])
    assert torch.float32 in widths.seen  # what the same model does when it is not asked for more


def test_the_gradient_is_the_slope_that_only_fp64_can_measure(oracle, batches, truth):
    """Central differences over 2e-5: in fp32 the loss has no digit left to take them from."""
    parameters, run, batch = trainable(oracle.run.model), oracle.run, batches[0]
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


def test_the_packed_reference_agrees(batches, truth):
    reference = built()
    assert max(distance(reference, batch, exact) for batch, exact in zip(batches, truth, strict=True)) < AGREES


def test_the_packing_error_is_the_worst_parameter_s_distance(oracle, batches, truth):
    error, name = packing_error(oracle.run, batches[0], oracle.exact, truth[0])
    assert 0 < error < 1e-12 and name in truth[0]  # fp64 throughout
    for factor, wanted in ((1.25, 0.2), (0.0, math.inf), (math.nan, math.nan)):
        first, *others = truth[0]
        wrong = truth[0] | {first: factor * truth[0][first], others[0]: 1.01 * truth[0][others[0]]}
        error, name = packing_error(oracle.run, batches[0], oracle.exact, wrong)
        assert error == pytest.approx(wanted, rel=1e-9, nan_ok=True) and name == first


@pytest.mark.parametrize("error", [math.nan, math.inf, 1e-3])
def test_the_worker_answers_with_the_worst_batch(error, oracle, tmp_path, monkeypatch):
    """Of the batches, the second is off; and where it is NaN, no number after it hides that."""
    errors = iter([(1e-9, "first"), (error, "second"), (1e-6, "third")])
    monkeypatch.setattr(worker, "packing_error", lambda *arguments: next(errors))
    answer = oracle.oracle(3, str(tmp_path))
    assert answer["packing_error_name"] == "second"
    assert answer["packing_error"] == pytest.approx(error, nan_ok=True)
    assert len(list(tmp_path.iterdir())) == 3


def test_only_fp64_switches_recomputation_off(oracle):
    assert CONFIG.gradient_checkpointing and not oracle.run.model.is_gradient_checkpointing
    wide = built(exact=True, config=dataclasses.replace(CONFIG, dtype="bfloat16"))
    assert wide.exact is torch.float32 and wide.run.model.is_gradient_checkpointing


@pytest.mark.parametrize(
    "leak",
    [
        planted.swap_modules(PackedDeltaNet, planted.stock_layer), planted.swap_modules(PackedDeltaNet, planted.StateLeak),
        planted.swap_modules(PackedDeltaNet, planted.ConvLeak), planted.attention_across_documents,
    ],
    ids=["transformers' own layer", "state", "convolution", "attention"],
)  # fmt: skip
def test_a_leak_is_far_from_the_oracle(leak, batches, truth):
    leaky = built()
    leak(leaky.run)
    assert min(distance(leaky, batch, exact) for batch, exact in zip(batches, truth, strict=True)) > LEAKS


def test_a_bf16_model_is_raised_to_fp32_without_changing_a_value():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    low, high = Worker(io.StringIO()), built(exact=True, config=config)
    low.build(to_plain(config), [])
    assert make_exact(low.run) is high.exact is torch.float32
    stays = {name: value for name, value in high.run.model.named_parameters() if ".lora_B." not in name}
    again = dict(low.run.model.named_parameters())
    assert all(value.dtype is torch.float32 and torch.equal(value, again[name]) for name, value in stays.items())
    assert all(torch.equal(value, value.bfloat16().float()) for value in stays.values())


def test_a_parameter_without_gradient_is_an_error_not_a_zero(batches):
    lacking = built(exact=True)
    planted.adapters(planted.without_gradient_of_a, "0.mlp.down_proj")(lacking.run)
    with pytest.raises(RuntimeError, match=r"no gradient for 1 parameters, first model\.layers\.0\.mlp\.down_proj\.lora_A"):
        exact_gradients(lacking.run, batches[0], lacking.exact)


def test_unpacked_documents_are_rows_of_their_own(batches):
    for batch in (*batches, tricky_batch(256, 2, 99, seed=0)):
        starts = [0, *torch.tensor(batch.lengths).cumsum(0).tolist()]
        ids, labels = batch.input_ids.flatten(), batch.labels.flatten()
        wanted = [(ids[a:b].tolist(), labels[a:b].tolist()) for a, b in pairwise(starts) if (labels[a:b] != IGNORE).any()]
        found = []
        for rows in unpacked(batch):
            length = rows.input_ids.shape[1]
            assert length % CHUNK == 0 and set(rows.lengths) == {length}
            assert torch.equal(rows.position_ids, torch.arange(length).expand(len(rows.input_ids), -1))
            found += list(zip(rows.input_ids.tolist(), rows.labels.tolist(), strict=True))
        assert len(found) == len(wanted)
        for document, supervised in wanted:
            padding = next(len(row) - len(document) for row, _ in found if row[: len(document)] == document)
            assert (document + [0] * padding, supervised + [IGNORE] * padding) in found
        assert sum(rows.supervised_tokens for rows in unpacked(batch)) == batch.supervised_tokens


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
        with pytest.raises(ZeroDivisionError), exact_arithmetic(torch.float32):
            assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
            raise ZeroDivisionError
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_every_dtype_has_a_wider_one():
    assert all(torch.finfo(wide).bits > torch.finfo(narrow).bits for narrow, wide in EXACT_DTYPE.items())
