"""gated_rms_norm: the function on awkward inputs, what it leaves out, and the swap on the models that it is for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from micro_steps import step
from torch import Tensor, nn
from torch.nn import functional as F

from abtest.opcheck import check_op
from abtest.oracle import worst_error
from abtest.quantity import same_bits
from kernels.contract import Workload
from kernels.gated_rms_norm import OPTIMIZATION, kernel
from kernels.gated_rms_norm.kernel import gated_rms_norm
from kernels.gated_rms_norm.op import gated_norm_op
from kernels.gated_rms_norm.patch import FusedGatedRMSNorm, apply, eligible, gated_norms, is_gated_norm
from kernels.gated_rms_norm.reference import EPS, gated_rms_norm_reference
from loop.config import Config, DataConfig, LoraConfig
from loop.lora import adapters
from loop.run import Run
from loop.training import build

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def case(T: int, D: int) -> Workload:
    return Workload("case", {"T": T, "D": D, "trained": 1}, "float32", small=True)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).requires_grad_()


def inputs_of(*shape: int) -> list[Tensor]:
    """x, gate and weight."""
    return [drawn(*shape), drawn(*shape, seed=1), (1.0 + 0.2 * drawn(shape[-1], seed=2).detach()).requires_grad_()]


def ours(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return gated_rms_norm(x, gate, weight, EPS)


def textbook(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight * gate * torch.sigmoid(gate)


def assert_near_truth(inputs: list[Tensor], incoming: Tensor, prepare=lambda *values: values) -> None:
    """Output and all gradients in fp32, beside those of the textbook's formula in fp64; `prepare` makes views of inputs."""
    sides = []
    for function, dtype in ((ours, torch.float32), (textbook, torch.float64)):
        y = function(*prepare(*(value.to(dtype) for value in inputs)))
        sides.append([y, *torch.autograd.grad(y, inputs, incoming.to(dtype))])
    for mine, exact in zip(*sides, strict=True):
        torch.testing.assert_close(mine, exact.to(mine.dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("T", "D"), [(61, 33), (129, 40), (37, 2500), (700, 128)], ids=str)
def test_shapes_that_no_block_divides(T, D):
    workload = case(T, D)
    report = check_op(gated_norm_op(workload), workload, DEVICE)
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
    assert_near_truth(inputs_of(T, D), drawn(T, D, seed=3).detach())


def test_rows_that_lie_apart_are_read_in_place():
    x, gate, weight = inputs_of(2, 5, 3, 2 * 32)
    half = gate.chunk(2, dim=-1)[1]
    assert kernel._rows(half).data_ptr() == half.data_ptr() and kernel._rows(half).stride() == (64, 1)
    incoming = drawn(3, 5, 2, 32, seed=4).detach().transpose(0, 2)
    assert ours(x[..., :32], half, weight[::2]).is_contiguous()
    assert_near_truth([x, gate, weight], incoming, lambda x, gate, w: (x[..., :32], gate.chunk(2, dim=-1)[1], w[::2]))


def test_transposed_inputs_and_expanded_gradients():
    x, gate, weight = inputs_of(40, 40)
    incoming = torch.full((1, 1), 0.5, device=DEVICE).expand(40, 40)
    assert_near_truth(
        [x, drawn(40, 120), weight], drawn(40, 80, seed=6).detach()[:, 40:], lambda x, gate, w: (x, gate[:, 9:49], w)
    )
    assert_near_truth([x, gate, weight], incoming, lambda x, gate, w: (x.t(), gate.t(), w))
    assert_near_truth([x, gate, weight], drawn(40, 40, seed=5).detach().t())


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy's word on it, in the interpreter
def test_flat_ends_of_the_sigmoid():
    ends = torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e4], device=DEVICE)
    inputs = [*inputs_of(3, 7)]
    inputs[1] = ends.repeat(3, 1).requires_grad_()
    sides = [side(*inputs, EPS) for side in (gated_rms_norm, gated_rms_norm_reference)]
    torch.testing.assert_close(*sides, rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(*(torch.autograd.grad(side.sum(), inputs) for side in sides), rtol=1e-4, atol=1e-3)


def test_rows_of_zeros_are_finite():
    x, gate, weight = inputs_of(4, 24)
    with torch.no_grad():
        x[1] = 0.0
    assert_near_truth(
        [x, gate, weight], drawn(4, 24, seed=3).detach() * torch.tensor([[1.0], [1e-3], [1.0], [1.0]]).to(DEVICE)
    )


def test_a_frozen_weight_has_no_gradient_computed(monkeypatch):
    x, gate, weight = inputs_of(9, 24)
    incoming = drawn(9, 24, seed=3).detach()
    want = torch.autograd.grad(ours(x, gate, weight), (x, gate), incoming)
    monkeypatch.setattr(kernel, "_reduce_kernel", None)  # whoever adds up partial sums fails
    with pytest.raises(TypeError):
        torch.autograd.grad(ours(x, gate, weight), weight, incoming)
    got = torch.autograd.grad(ours(x, gate, weight.detach()), (x, gate), incoming)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_keeps_its_inputs_and_one_number_a_row():
    inputs, kept = inputs_of(3, 4, 24), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = ours(*inputs)
    assert y.shape == (3, 4, 24) and [value.data_ptr() for value in kept[:-1]] == [value.data_ptr() for value in inputs]
    assert kept[-1].shape == (3, 4) and kept[-1].dtype == torch.float32


def test_a_second_call_has_the_same_bits_and_rows_do_not_meet():
    x, gate, weight = inputs_of(300, 48)
    incoming = drawn(300, 48, seed=3).detach()

    def results(x, gate, incoming):
        y = ours(x, gate, weight)
        return y, *torch.autograd.grad(y, (x, gate, weight), incoming)

    first, second = results(x, gate, incoming), results(x, gate, incoming)
    assert all(map(same_bits, first, second))
    part = slice(131, 164)
    alone = results(*(value.detach()[part].clone().requires_grad_() for value in (x, gate)), incoming[part].clone())
    assert all(same_bits(whole[part], own) for whole, own in zip(first[:3], alone[:3], strict=True))


@pytest.mark.parametrize("shape", [(4, 24), (3, 2, 7), (0, 8)], ids=str)
def test_the_custom_ops_are_well_behaved(shape):
    x, gate, weight = inputs_of(*shape)
    plain, rstd = [value.detach() for value in (x, gate, weight)], torch.rand(shape[:-1], device=DEVICE)
    for operator, arguments in (
        (torch.ops.isoloss.gated_rms_norm.default, (x, gate, weight, EPS)),
        (torch.ops.isoloss.gated_rms_norm_backward.default, (torch.randn_like(plain[0]), *plain, rstd, True)),
        (torch.ops.isoloss.gated_rms_norm_backward.default, (torch.randn_like(plain[0]), *plain, rstd, False)),
    ):
        outcome = torch.library.opcheck(operator, arguments)
        assert set(outcome.values()) == {"SUCCESS"}, outcome


def test_empty_rows_still_give_a_gradient():
    x, gate, weight = inputs_of(0, 8)
    ours(x, gate, weight).sum().backward()
    assert x.grad.shape == gate.grad.shape == (0, 8) and torch.equal(weight.grad, torch.zeros(8, device=DEVICE))


def test_refuses_what_it_cannot_compute():
    x, weight = torch.ones(2, 3, device=DEVICE), torch.ones(3, device=DEVICE)
    with pytest.raises(ValueError, match=r"\[2, 3\].*not \[2\]"):
        gated_rms_norm(x, x, weight[:2], EPS)
    with pytest.raises(ValueError, match=r"must agree: .*gate \[2, 1\]"):
        gated_rms_norm(x, x[:, :1], weight, EPS)
    with pytest.raises(ValueError, match=r"must agree: .*bfloat16"):
        gated_rms_norm(x, x, weight.bfloat16(), EPS)
    with pytest.raises(ValueError, match="float64"):
        gated_rms_norm(x.double(), x.double(), weight.double(), EPS)


def built(model: str, method: str = "full", checkpointing: bool = False) -> tuple[Run, object]:
    """A loop-built run whose gated norms and adapters are not at their neutral values, and a batch."""
    where = {"device": DEVICE.type, "dtype": "float32", "gradient_checkpointing": checkpointing}
    settings = {"repeatable_attention": True, "lora": LoraConfig(rank=4, alpha=8.0), "data": DataConfig(pack_length=96)}
    run, dataset = build(Config(model=model, method=method, **where, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in gated_norms(run.model):
            weight = run.model.get_submodule(name).weight
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator) + 1)
        for adapter in adapters(run.model) if method == "lora" else ():
            adapter.b.copy_(0.02 * torch.randn(adapter.b.shape, generator=generator))
    return run, dataset.micro_batches(0, 1, 1)[0].to(run.device)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_qwen35_trains_as_before(method, checkpointing):
    run, batch = built("qwen3.5-tiny", method, checkpointing)
    names, before = gated_norms(run.model), dict(run.model.named_parameters())
    assert names == [f"model.layers.{index}.linear_attn.norm" for index in range(3)]
    state, stock = list(run.model.state_dict()), step(run, batch)
    assert OPTIMIZATION.eligible(run) is None
    OPTIMIZATION.apply(run)
    swapped = [run.model.get_submodule(name) for name in names]
    assert all(isinstance(norm, FusedGatedRMSNorm) and norm.training for norm in swapped)
    after = dict(run.model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert list(run.model.state_dict()) == state
    changed = step(run, batch)
    assert changed.keys() == stock.keys() and len(stock) > 10
    error, where = worst_error(changed, stock)  # pools a layer's four decay rates, which alone are ill-conditioned
    assert 0 < error <= 1e-4, where
    assert "has no gated RMSNorm" in eligible(run)


@pytest.mark.parametrize("model", ["qwen3-tiny", "llama-tiny"])
def test_models_without_a_delta_rule_are_told_why(model):
    run, _ = built(model)
    assert eligible(run).endswith("has no gated RMSNorm of the form norm(x) * weight * silu(gate)")
    with pytest.raises(ValueError, match="to replace"):
        apply(run)


class GatedNorm(nn.Module):
    """The form that the swap looks for, with room for one deviation."""

    def __init__(self, activation=F.silu, eps: float = 1e-6, gate_first: bool = False):
        super().__init__()
        self.weight, self.activation, self.eps, self.gate_first = nn.Parameter(torch.ones(16)), activation, eps, gate_first

    def forward(self, hidden, gate):
        if self.gate_first:
            hidden, gate = hidden * F.silu(gate), torch.full_like(gate, 1.2784645)
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (self.weight * wide.to(hidden.dtype) * self.activation(gate.float())).to(hidden.dtype)


def test_only_the_exact_form_is_swapped():
    assert is_gated_norm(GatedNorm())
    assert not is_gated_norm(GatedNorm(F.sigmoid)) and not is_gated_norm(GatedNorm(F.gelu))
    assert not is_gated_norm(GatedNorm(eps=1e-5)) and not is_gated_norm(GatedNorm(gate_first=True))
    assert not is_gated_norm(nn.LayerNorm(16)) and not is_gated_norm(FusedGatedRMSNorm(GatedNorm().weight, 1e-6))
    hooked = GatedNorm()
    hooked.register_forward_hook(lambda module, arguments, output: output)
    assert not is_gated_norm(hooked)


def test_reasons_are_in_words(monkeypatch):
    run = SimpleNamespace(model=nn.Sequential(GatedNorm()), device=DEVICE, dtype=torch.bfloat16)
    assert eligible(run) == "0.weight is torch.float32, but the run computes in torch.bfloat16; the kernel takes one dtype"
    run.dtype = torch.float64
    assert "the kernel takes torch.bfloat16" in eligible(run)
    run.dtype = torch.float32
    assert eligible(run) is None
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    assert "TRITON_INTERPRET=1" in eligible(SimpleNamespace(model=run.model, device=torch.device("cpu")))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.mem_get_info()[1] < 64 << 30, reason="needs a GPU with 64 GiB of memory"
)
def test_offsets_beyond_2_to_the_31():
    T, D = (1 << 24) + 64, 128
    x, gate = (torch.randn(64, D, device="cuda").bfloat16().repeat(T // 64, 1).requires_grad_() for _ in range(2))
    weight, incoming = torch.ones(D, device="cuda").bfloat16(), torch.ones(1, D, device="cuda").bfloat16().expand(T, D)
    y = ours(x, gate, weight)
    for value in (y, *torch.autograd.grad(y, (x, gate), incoming)):
        assert torch.equal(value[-64:], value[:64])
