"""rms_norm: the function on awkward inputs, what it leaves out, and the swap on the models that it is for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from micro_steps import step
from torch import Tensor, nn

from abtest.opcheck import check_op
from abtest.oracle import worst_error
from abtest.quantity import same_bits
from kernels.contract import Workload
from kernels.rms_norm import OPTIMIZATION, kernel
from kernels.rms_norm.kernel import add_rms_norm, rms_norm, rms_norm_beside
from kernels.rms_norm.op import norm_op
from kernels.rms_norm.patch import FusedRMSNorm, apply, eligible, form_of, norms
from kernels.rms_norm.reference import EPS, add_rms_norm_reference, rms_norm_reference
from loop.config import Config, DataConfig, LoraConfig
from loop.lora import adapters
from loop.run import Run
from loop.training import build

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FORMS = pytest.mark.parametrize("zero_centred", [True, False], ids=["zero-centred", "plain"])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).requires_grad_()


def weight_of(D: int, zero_centred: bool) -> Tensor:
    return (0.2 * drawn(D, seed=9).detach() + (not zero_centred)).requires_grad_()


def assert_near_truth(function, truth, inputs: list[Tensor], incoming: list[Tensor]) -> None:
    """Outputs and all gradients of `function` in fp32, beside those of `truth` in fp64."""
    sides = []
    for side, dtype in ((function, torch.float32), (truth, torch.float64)):
        outputs = side(*(value.to(dtype) for value in inputs))
        sides.append([*outputs, *torch.autograd.grad(outputs, inputs, [gradient.to(dtype) for gradient in incoming])])
    for ours, exact in zip(*sides, strict=True):
        torch.testing.assert_close(ours, exact.to(ours.dtype), rtol=1e-5, atol=1e-5)


def textbook(x: Tensor, weight: Tensor, zero_centred: bool) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * (1.0 + weight if zero_centred else weight)


def add_textbook(zero_centred: bool):
    return lambda x, residual, weight: (textbook(residual + x, weight, zero_centred), residual + x)


@pytest.mark.parametrize("add", [False, True], ids=["alone", "behind an addition"])
@FORMS
@pytest.mark.parametrize(("T", "D"), [(61, 33), (129, 40), (37, 2500)], ids=str)
def test_shapes_that_no_block_divides(T, D, zero_centred, add):
    shape = {"T": T, "D": D, "zero_centred": int(zero_centred), "add": int(add), "trained": 1}
    workload = Workload("case", shape, "float32", small=True)
    report = check_op(norm_op(workload), workload, DEVICE)
    assert report.passed, report.verdict.reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("D", [8, 128, 256, 2048, 65536])
def test_tiles_fetched_ahead_fit_in_shared_memory(D, dtype, monkeypatch):
    monkeypatch.setattr(kernel, "TILE_INTERPRETED", kernel.TILE_DWEIGHT)
    tile = kernel.tiling(D, True)
    stages = kernel.stages(tile, dtype)
    assert 1 <= stages <= kernel.STAGES and (stages - 1) * 3 * tile["BT"] * tile["BD"] * dtype.itemsize <= 48 * 1024
    assert D > 256 or dtype is torch.float32 or stages == kernel.STAGES


@pytest.mark.parametrize(("T", "D"), [(1, 1), (1, 7), (1, 24), (8, 24), (9, 24), (71, 24)], ids=str)
def test_rows_shared_out_over_programs_and_tiles(T, D, monkeypatch):
    for constant in ("TILE", "TILE_DWEIGHT", "TILE_INTERPRETED"):
        monkeypatch.setattr(kernel, constant, 64)  # 2 rows of 24, 32 wide, a tile
    monkeypatch.setattr(kernel, "WARPS_DWEIGHT", 3)
    inputs = [drawn(T, D), drawn(T, D, seed=1), weight_of(D, True)]
    incoming = [drawn(T, D, seed=seed).detach() for seed in (2, 3)]
    assert_near_truth(lambda x, r, w: add_rms_norm(x, r, w, EPS, True), add_textbook(True), inputs, incoming)


@FORMS
def test_rows_that_lie_apart_are_read_in_place(zero_centred):
    both = drawn(2, 5, 3, 2 * 32)  # query and gate of three heads, as Qwen3.5's projection gives them
    query, _ = both.chunk(2, dim=-1)
    assert kernel._rows(query).data_ptr() == query.data_ptr() and kernel._rows(query).stride() == (64, 1)
    weight = weight_of(32, zero_centred)
    assert rms_norm(query, weight, EPS, zero_centred).is_contiguous()

    def of(function):
        return lambda both, weight: (function(both.chunk(2, dim=-1)[0], weight, zero_centred).transpose(1, 2),)

    ours = of(lambda x, weight, form: rms_norm(x, weight, EPS, form))
    assert_near_truth(ours, of(textbook), [both, weight], [drawn(2, 3, 5, 32, seed=1).detach()])


@FORMS
def test_strided_and_expanded_gradients(zero_centred):
    x, residual, weight = drawn(6, 40), drawn(6, 40, seed=1), weight_of(40, zero_centred)
    transposed, expanded = drawn(40, 6, seed=2).detach().t(), torch.full((1, 1), 0.5, device=DEVICE).expand(6, 40)
    cut, from_wider = drawn(6, 80, seed=3).detach()[:, :40], drawn(6, 120, seed=4).detach()[:, 40:80]

    for incoming in ([transposed, expanded], [expanded, transposed], [cut, from_wider]):
        inputs, truth = [x, residual, weight], add_textbook(zero_centred)
        assert_near_truth(lambda x, r, w: add_rms_norm(x, r, w, EPS, zero_centred), truth, inputs, incoming)


def test_only_one_of_two_outputs_is_used():
    x, residual, weight = drawn(4, 24), drawn(4, 24, seed=1), weight_of(24, True)
    incoming = drawn(4, 24, seed=2).detach()
    sides = [norm(x, residual, weight, EPS, True) for norm in (add_rms_norm, add_rms_norm_reference)]
    got, want = (torch.autograd.grad(side[0], (x, residual, weight), incoming, retain_graph=True) for side in sides)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    of_sum = torch.autograd.grad(sides[0][1], (x, residual, weight), incoming, allow_unused=True)
    assert torch.equal(of_sum[0], incoming) and torch.equal(of_sum[1], incoming) and of_sum[2] is None


@pytest.mark.parametrize("used", ["both", "the norm", "x"])
@FORMS
def test_x_beside_its_norm(zero_centred, used):
    """Its gradient is added where the norm's is made, and nobody adds up two gradients of x."""
    inputs = [drawn(5, 40), weight_of(40, zero_centred)]
    taken = {"both": slice(2), "the norm": slice(1), "x": slice(1, 2)}[used]
    incoming = [drawn(40, 5, seed=2).detach().t(), torch.full((1, 1), 0.5, device=DEVICE).expand(5, 40)][taken]
    leaves = inputs if used != "x" else inputs[:1]

    def gradients(outputs: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs[taken], leaves, [gradient.to(dtype) for gradient in incoming])

    y, same = rms_norm_beside(*inputs, EPS, zero_centred)
    assert torch.equal(y, rms_norm(*inputs, EPS, zero_centred)) and same.data_ptr() == inputs[0].data_ptr()
    assert same.grad_fn is y.grad_fn
    exact = [value.double() for value in inputs]
    want = gradients((textbook(*exact, zero_centred), exact[0]), torch.float64)
    for mine, truth in zip(gradients((y, same), torch.float32), want, strict=True):
        torch.testing.assert_close(mine.double(), truth.double(), rtol=1e-5, atol=1e-5)


def test_a_frozen_weight_has_no_gradient_computed(monkeypatch):
    x, weight, incoming = drawn(9, 24), weight_of(24, True), drawn(9, 24, seed=1).detach()
    want = torch.autograd.grad(rms_norm(x, weight, EPS, True), x, incoming, retain_graph=True)[0]
    monkeypatch.setattr(kernel, "_reduce_kernel", None)  # whoever adds up partial sums fails
    with pytest.raises(TypeError):
        torch.autograd.grad(rms_norm(x, weight, EPS, True), weight, incoming)
    got = torch.autograd.grad(rms_norm(x, weight.detach(), EPS, True), x, incoming)[0]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_keeps_x_or_the_sum_and_one_number_a_row():
    x, residual, weight = drawn(3, 4, 24), drawn(3, 4, 24, seed=1), weight_of(24, True)
    for alone in (True, False):
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, kept=kept: kept.append(tensor) or tensor, lambda t: t):
            y, *total = (rms_norm(x, weight, EPS, True),) if alone else add_rms_norm(x, residual, weight, EPS, True)
        main, of_weight, rstd = kept
        assert main.data_ptr() == (x if alone else total[0]).data_ptr() and of_weight.data_ptr() == weight.data_ptr()
        assert rstd.shape == (3, 4) and rstd.dtype == torch.float32 and y.shape == x.shape


@FORMS
def test_a_second_call_has_the_same_bits_and_rows_do_not_meet(zero_centred):
    x, weight, incoming = drawn(300, 48), weight_of(48, zero_centred), drawn(300, 48, seed=1).detach()

    def results(x, incoming):
        y = rms_norm(x, weight, EPS, zero_centred)
        return y, *torch.autograd.grad(y, (x, weight), incoming)

    first, second = results(x, incoming), results(x, incoming)
    assert all(map(same_bits, first, second))
    part = slice(131, 164)
    alone = results(x.detach()[part].clone().requires_grad_(), incoming[part].clone())
    assert all(same_bits(whole[part], own) for whole, own in zip(first[:2], alone[:2], strict=True))


@pytest.mark.parametrize("shape", [(4, 24), (3, 2, 7), (0, 8)], ids=str)
def test_the_custom_ops_are_well_behaved(shape):
    x, residual, dy = (torch.randn(shape, device=DEVICE) for _ in range(3))
    weight, rstd = torch.randn(shape[-1], device=DEVICE), torch.rand(shape[:-1], device=DEVICE)
    differentiable = [value.clone().requires_grad_() for value in (x, residual, weight)]
    for operator, arguments in (
        (torch.ops.isoloss.rms_norm.default, (differentiable[0], differentiable[2], EPS, True)),
        (torch.ops.isoloss.add_rms_norm.default, (*differentiable, EPS, False)),
        (torch.ops.isoloss.rms_norm_backward.default, (dy, None, x, weight, rstd, True, True)),
        (torch.ops.isoloss.rms_norm_backward.default, (dy, residual, x, weight, rstd, False, False)),
    ):
        outcome = torch.library.opcheck(operator, arguments)
        assert set(outcome.values()) == {"SUCCESS"}, outcome


def test_empty_rows_still_give_a_gradient():
    x, weight = drawn(0, 8), weight_of(8, True)
    rms_norm(x, weight, EPS, True).sum().backward()
    assert x.grad.shape == (0, 8) and torch.equal(weight.grad, torch.zeros(8, device=DEVICE))


def test_refuses_what_it_cannot_compute():
    x, weight = torch.ones(2, 3, device=DEVICE), torch.ones(3, device=DEVICE)
    wide = torch.ones(1, 65537, device=DEVICE)
    for rows, scale, words in (
        (x, weight[:2], r"\[2, 3\].*not \[2\]"),
        (x, weight.bfloat16(), r"must agree: .*bfloat16"),
        (x.double(), weight.double(), "float64"),
        (wide, wide[0], "1 to 65536"),
    ):
        with pytest.raises(ValueError, match=words):
            rms_norm(rows, scale, EPS, True)
    with pytest.raises(ValueError, match=r"residual \[2, 1\]"):
        add_rms_norm(x, x[:, :1], weight, EPS, True)


def built(model: str, method: str = "full", checkpointing: bool = False) -> tuple[Run, object]:
    """A loop-built run whose norms and adapters are not at their neutral values, and a batch."""
    where = {"device": DEVICE.type, "dtype": "float32", "gradient_checkpointing": checkpointing}
    settings = {"repeatable_attention": True, "lora": LoraConfig(rank=4, alpha=8.0), "data": DataConfig(pack_length=96)}
    run, dataset = build(Config(model=model, method=method, **where, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, form in norms(run.model).items():
            weight = run.model.get_submodule(name).weight
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator) + (not form))
        for adapter in adapters(run.model) if method == "lora" else ():
            adapter.b.copy_(0.02 * torch.randn(adapter.b.shape, generator=generator))
    return run, dataset.micro_batches(0, 1, 1)[0].to(run.device)


def assert_beside(ours: dict[str, Tensor], stock: dict[str, Tensor]) -> None:
    """Within fp32's rounding. A layer's four decay rates alone are ill-conditioned, so they are pooled as the gate does."""
    assert ours.keys() == stock.keys() and len(stock) > 10
    error, where = worst_error(ours, stock)
    assert error <= 1e-4, where


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_qwen35_trains_as_before(method, checkpointing):
    run, batch = built("qwen3.5-tiny", method, checkpointing)
    names, before = norms(run.model), dict(run.model.named_parameters())
    assert len(names) == 2 * 4 + 2 + 1 and all(names.values())
    state, stock = list(run.model.state_dict()), step(run, batch)
    assert OPTIMIZATION.eligible(run) is None
    OPTIMIZATION.apply(run)
    layers = run.model.get_decoder().layers
    assert {type(layer).__name__ for layer in layers} == {"FusedDecoderLayer"}
    assert sum(isinstance(module, FusedRMSNorm) for module in run.model.modules()) == len(names)
    after = dict(run.model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert list(run.model.state_dict()) == state and all(module.training for module in layers)
    assert all(layer.gradient_checkpointing is checkpointing for layer in layers)
    calls = []
    layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    assert_beside(step(run, batch), stock)
    assert len(calls) == 1 + checkpointing and "has no RMSNorm" in eligible(run)


@pytest.mark.parametrize("model", ["qwen3-tiny", "llama-tiny", "qwen3.5-tiny"])
def test_other_layers_keep_their_forward_and_have_the_norm_alone(model, monkeypatch):
    run, batch = built(model)
    kind = type(run.model.get_decoder().layers[0])
    forward = kind.forward
    if model == "qwen3.5-tiny":  # a version of transformers whose layer does something more
        monkeypatch.setattr(kind, "forward", lambda self, hidden, **given: 1.1 * forward(self, hidden, **given))
    stock = step(run, batch)
    assert set(norms(run.model).values()) == {model == "qwen3.5-tiny"}
    apply(run)
    assert {type(layer) for layer in run.model.get_decoder().layers} == {kind} and not norms(run.model)
    assert_beside(step(run, batch), stock)


def test_a_layer_s_residual_comes_from_beside_its_first_norm():
    run, batch = built("qwen3.5-tiny")
    apply(run)
    outputs = []
    run.model.get_decoder().layers[1].register_forward_hook(lambda layer, arguments, output: outputs.append(output))
    run.model(batch.input_ids)
    (second_norm, _), _ = outputs[0].grad_fn.next_functions
    (_, _), (residual, _), *_ = second_norm.next_functions
    assert residual.name() == "_BesideBackward"


def test_recording_and_hooks_survive():
    run, batch = built("qwen3.5-tiny")
    seen = []
    run.model.get_decoder().layers[2].register_forward_hook(lambda module, arguments, output: seen.append(output))
    ids = batch.input_ids
    want = run.model(ids, output_hidden_states=True).hidden_states
    apply(run)
    got = run.model(ids, output_hidden_states=True).hidden_states
    assert len(got) == len(want) == 5 and len(seen) == 2 and torch.equal(seen[1], got[3])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


class Norm(nn.Module):
    """The plain form, with room for one deviation."""

    def __init__(self, scale: float = 1.0, eps: float = 1e-6):
        super().__init__()
        self.weight, self.scale, self.eps = nn.Parameter(torch.ones(16)), scale, eps

    def forward(self, x):
        return self.scale * rms_norm_reference(x, self.weight, 1e-6, False)


def test_only_the_exact_forms_are_swapped():
    assert form_of(Norm()) is False
    assert form_of(Norm(scale=1.01)) is None and form_of(Norm(eps=1e-5)) is None
    assert form_of(nn.LayerNorm(16)) is None and form_of(nn.RMSNorm(16, eps=1e-6)) is None
    assert form_of(nn.Linear(16, 16, bias=False)) is None and form_of(FusedRMSNorm(Norm().weight, 1e-6, False)) is None
    hooked = Norm()
    hooked.register_forward_hook(lambda module, arguments, output: output)
    assert form_of(hooked) is None


def test_reasons_are_in_words(monkeypatch):
    run = SimpleNamespace(model=nn.Sequential(nn.Linear(2, 2)), device=DEVICE, dtype=torch.float32)
    assert eligible(run) == "Sequential has no RMSNorm that multiplies by weight or 1 + weight and does nothing else"
    with pytest.raises(ValueError, match="Sequential"):
        apply(run)
    run.model = nn.Sequential(Norm())
    assert eligible(run) is None
    run.dtype = torch.bfloat16
    assert eligible(run) == "0.weight is torch.float32, but the run computes in torch.bfloat16; the kernel takes one dtype"
    run.dtype = torch.float64
    assert "the kernel takes torch.bfloat16" in eligible(run)
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    assert "TRITON_INTERPRET=1" in eligible(SimpleNamespace(model=run.model, device=torch.device("cpu")))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.mem_get_info()[1] < 64 << 30, reason="needs a GPU with 64 GiB of memory"
)
def test_offsets_beyond_2_to_the_31():
    T, D = (1 << 20) + 64, 2048
    x, residual = (torch.randn(64, D, device="cuda").bfloat16().repeat(T // 64, 1).requires_grad_() for _ in range(2))
    weight, incoming = torch.zeros(D, device="cuda").bfloat16(), torch.ones(1, D, device="cuda").bfloat16().expand(T, D)
    outputs = add_rms_norm(x, residual, weight, EPS, True)
    for value in (*outputs, *torch.autograd.grad(outputs, (x, residual), (incoming, incoming))):
        assert torch.equal(value[-64:], value[:64])
