"""fp8_mma: rounding to e4m3 against fp64, the layer against its emulation, the swap, and who is refused. The
product is in test_fp8_mma_product.py, its build in test_fp8_mma_build.py."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn

from kernels.registry import refusal, select
from loop import lora
from loop.batch import IGNORE, PackedBatch
from loop.config import Config, LoraConfig, OptimConfig
from loop.errors import UserError
from loop.model import cross_entropy_head, load_model, plain_micro_step, trainable
from loop.optim import MasterAdamW
from loop.run import Run
from loop.training import accumulate
from negative_results.fp8_mma import OPTIMIZATION, patch
from negative_results.fp8_mma.kernel import Fp8Linear, fp8_linear, quantise_weight
from negative_results.fp8_mma.quantise import quantise_rows
from negative_results.fp8_mma.reference import FLOOR, decode, product_reference, quantise_rows_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIDES = pytest.mark.parametrize("quantise", [quantise_rows_reference, quantise_rows], ids=["reference", "kernel"])
# OCP's E4M3 by definition: sign, 4 bits of exponent with bias 7, 3 of mantissa, no infinities, S.1111.111 is NaN.
MAGNITUDES = np.array(
    [(8 + c % 8) * 2.0 ** (c // 8 - 10) if c >= 8 else c * 2.0**-9 for c in range(127)], dtype=np.float64
)  # by code


def nearest_codes(values: np.ndarray) -> np.ndarray:
    """fp64 -> the code of the nearest e4m3 number, of two equally near ones the even code; beyond 448 it is 448's."""
    sizes = np.minimum(np.abs(values), MAGNITUDES[-1])
    above = np.searchsorted(MAGNITUDES, sizes)
    below = np.maximum(above - 1, 0)
    up, down = MAGNITUDES[above] - sizes, sizes - MAGNITUDES[below]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return (code | np.signbit(values) * 0x80).astype(np.uint8)


def emulated(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of finite rows: fp32 where the definition says so, and the rounding in fp64."""
    wide = x.float().numpy()
    largest = np.maximum(np.abs(wide).max(1), np.float32(FLOOR))
    scaled = wide * (np.float32(448) / largest)[:, None]
    assert scaled.dtype == np.float32
    return nearest_codes(scaled.astype(np.float64)), largest / np.float32(448)


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def check_bits(quantise, x: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = (value.cpu() for value in quantise(x.to(DEVICE)))
    want_codes, want_scales = emulated(x)
    assert codes.dtype == torch.uint8 and scales.dtype == torch.float32
    assert np.array_equal(codes.numpy(), want_codes)
    assert np.array_equal(scales.numpy().view(np.int32), want_scales.view(np.int32))
    return codes, scales


def test_codes_stand_for_the_numbers_of_the_format():
    assert np.array_equal(decode(torch.arange(127, dtype=torch.uint8)).double().numpy(), MAGNITUDES)
    assert MAGNITUDES[-1] == 448 and MAGNITUDES[8] == 2.0**-6
    assert decode(torch.tensor([0x7F, 0xFF], dtype=torch.uint8)).isnan().all()


@SIDES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 48), (4, 2047), (3, 4100)], ids=str)
def test_rows_have_the_bits_of_an_fp64_emulation(quantise, dtype, shape):
    x = (normal(*shape) * 2 ** (4 * normal(*shape, seed=1))).to(dtype)
    codes, scales = check_bits(quantise, x)
    error = (decode(codes).double() * scales.double()[:, None] - x.double()).abs()
    assert (error <= torch.maximum(x.double().abs() * 2.0**-4, scales.double()[:, None] * 2.0**-10) * (1 + 1e-6)).all()


@SIDES
def test_every_number_tie_and_neighbour_of_a_tie_is_rounded_right(quantise):
    ties = ((MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2).astype(np.float32)
    exact = [MAGNITUDES.astype(np.float32), ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(449))]
    values = torch.from_numpy(np.concatenate(exact))
    row = torch.cat([torch.tensor([448.0]), values, -values])  # 448 makes the factor 1
    codes, scales = check_bits(quantise, row[None])
    assert scales.item() == 1
    assert codes[0, 1 : 1 + len(MAGNITUDES)].tolist() == list(range(127))


@SIDES
def test_what_is_too_small_for_the_row_becomes_subnormal_and_then_zero(quantise):
    codes, _ = check_bits(quantise, torch.tensor([[448.0, 2.0**-9, 2.0**-10, 1.5 * 2.0**-10, -(2.0**-40), 0.0, -0.0]]))
    assert codes.tolist() == [[126, 1, 0, 1, 0x80, 0, 0x80]]


@SIDES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_zeros_and_of_denormals(quantise, dtype):
    if DEVICE.type == "cpu" and quantise is quantise_rows and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter does not widen denormals of bf16 as a GPU does")
    tiny = torch.tensor([2.0**-133, -(2.0**-130), 2.0**-127, 0.0])
    x = torch.stack([torch.zeros(4), tiny, tiny * 2.0**20, torch.tensor([2.0**-117, 2.0**-118, 0.0, 2.0**-126])]).to(dtype)
    codes, scales = check_bits(quantise, x)
    assert codes[0].tolist() == [0] * 4 and (scales >= torch.finfo(torch.float32).tiny).all()
    assert (decode(codes) * scales[:, None]).isfinite().all()
    assert codes[2, 2] == codes[3, 0] == 126  # from the floor on, a row fills the format


@SIDES
def test_the_largest_numbers_of_a_dtype(quantise):
    top = torch.finfo(torch.float32).max
    codes, scales = check_bits(quantise, torch.tensor([[top, -top, top / 2, 1.0]]))
    assert codes.tolist() == [[126, 254, 118, 0]] and scales.isfinite().all()


@SIDES
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's word on infinity times 0, in the interpreter
def test_what_is_not_finite_shows(quantise):
    x = torch.ones(4, 6)
    x[1, 2], x[2, 3], x[3, 0] = torch.nan, torch.inf, -torch.inf
    codes, scales = (value.cpu() for value in quantise(x.to(DEVICE)))
    assert codes[0].tolist() == [126] * 6 and codes[1].tolist() == [0x7F] * 6 and scales[1].isnan()
    assert codes[2].tolist() == [0, 0, 0, 0x7F, 0, 0] and codes[3].tolist() == [0x7F, 0, 0, 0, 0, 0]
    y = product_reference(codes, scales, codes[:1], scales[:1], torch.float32)
    assert y[0, 0].isfinite() and y[1:].isnan().all()


def test_only_rows_of_floating_point_are_quantised():
    for wrong in (torch.ones(3), torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"rows \[T, K\]"):
            quantise_rows(wrong)
    codes, scales = quantise_rows(torch.ones(0, 16, device=DEVICE))
    assert codes.shape == (0, 16) and scales.shape == (0,)


def frozen(out: int, width: int, bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Linear:
    linear = nn.Linear(width, out, bias=bias, dtype=dtype).requires_grad_(False)
    linear.weight.copy_(normal(out, width, seed=3) * width**-0.5)
    return linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_layer_is_its_emulation_forward_and_backward(dtype):
    linear = frozen(80, 48, bias=True, dtype=dtype)
    layer, x, dy = Fp8Linear(linear), normal(3, 5, 48).to(dtype).requires_grad_(), normal(3, 5, 80, seed=1).to(dtype)
    y = layer(x)
    y.backward(dy)
    by_output, by_input = quantise_rows_reference(linear.weight), quantise_rows_reference(linear.weight.t())
    want = product_reference(*quantise_rows_reference(x.detach().view(15, 48)), *by_output, dtype) + linear.bias
    dx = product_reference(*quantise_rows_reference(dy.view(15, 80)), *by_input, dtype)
    assert torch.equal(y, want.view(3, 5, 80)) and torch.equal(x.grad, dx.view(3, 5, 48))
    for mine, truth in ((y, linear(x)), (x.grad, dy @ linear.weight)):
        assert 0.01 < (mine - truth).norm() / truth.norm() < 0.06, "rounding to three bits, and no more, is expected"


def test_a_written_weight_is_quantised_again_and_dtypes_leave_codes_alone():
    linear = frozen(32, 16)
    layer, x = Fp8Linear(linear), normal(4, 16)
    before = layer(x)
    assert set(layer.state_dict()) == set(linear.state_dict()) and layer.weight is linear.weight
    layer.weight.mul_(-2)
    assert torch.equal(layer(x), -2 * before)
    assert layer.bfloat16().codes.dtype == torch.uint8
    with pytest.raises(ValueError, match="trains"):
        Fp8Linear(nn.Linear(16, 16))


def test_the_function_refuses_other_widths_and_dtypes():
    weight = quantise_weight(normal(32, 16))
    with pytest.raises(ValueError, match=r"\[2, 8\]; the last size must be 16"):
        fp8_linear(normal(2, 8), *weight)
    with pytest.raises(ValueError, match="float64"):
        fp8_linear(normal(2, 16).double(), *weight)


def test_a_well_behaved_custom_op_that_traces_without_a_graph_break():
    weight, x = quantise_weight(normal(32, 16)), normal(4, 16).requires_grad_()
    outcome = torch.library.opcheck(torch.ops.isoloss.fp8_linear.default, (x, *weight))
    assert set(outcome.values()) == {"SUCCESS"}, outcome
    layer = Fp8Linear(frozen(32, 16))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    want = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), x), want, rtol=0, atol=0)


def run_of(model: str, method: str = "lora", dtype: str = "bfloat16") -> Run:
    config = Config(model=model, device="cpu", dtype=dtype, method=method, lora=LoraConfig(rank=4, alpha=8.0))
    built = load_model(config, 97)
    if method == "lora":
        lora.attach(built, config.lora, seed=0)
        with torch.no_grad():
            for index, adapter in enumerate(lora.adapters(built)):  # so that A has a gradient, too
                adapter.b.copy_(0.1 * normal(*adapter.b.shape, seed=index))
    optimizer = MasterAdamW(trainable(built), OptimConfig(), 1)
    dtype = getattr(torch, dtype)
    return Run(config, torch.device("cpu"), dtype, built, cross_entropy_head, plain_micro_step, optimizer)


def step_of(run: Run) -> tuple[float, dict[str, Tensor]]:
    ids = torch.randint(97, (1, 40), generator=torch.Generator().manual_seed(5))
    labels = ids.roll(-1, dims=1)
    labels[0, -1] = IGNORE
    ends = torch.tensor([0, 40], dtype=torch.int32)
    batch = PackedBatch(ids, labels, torch.arange(40)[None], ends, 40, 39)
    return accumulate(run, [batch], 39)[0], {name: value.clone() for name, value in run.optimizer.gradients().items()}


@pytest.mark.parametrize("model", ["qwen3.5-shallow-tiny", "qwen2-tiny"])
def test_the_swap_keeps_the_checkpoint_and_nearly_the_gradients(model):
    run = run_of(model, dtype="float32")
    loss, theirs = step_of(run)
    run.optimizer.zero_grad()
    parameters, state = dict(run.model.named_parameters()), set(run.model.state_dict())
    patch.apply(run)
    swapped = [module for module in run.model.modules() if isinstance(module, Fp8Linear)]
    assert len(swapped) == sum(1 for adapter in lora.adapters(run.model) if patch._fits(adapter.base)) > 0
    assert set(run.model.state_dict()) == state
    after = dict(run.model.named_parameters())
    assert after.keys() == parameters.keys() and all(after[name] is value for name, value in parameters.items())
    own, ours = step_of(run)
    assert own != loss and own == pytest.approx(loss, rel=0.02)
    for name, want in theirs.items():
        assert (ours[name] - want).norm() < 0.5 * want.norm(), name
    assert "wraps a Fp8Linear, not a Linear" in patch.eligible(SimpleNamespace(**vars(run) | {"dtype": torch.bfloat16}))


def test_who_is_refused_and_why():
    run = run_of("qwen2-tiny")
    assert patch.eligible(run) is None
    assert refusal(OPTIMIZATION, run) == "needs a CUDA device; this run is on cpu"
    assert "full fine-tuning changes every weight" in patch.eligible(run_of("qwen2-tiny", method="full"))
    assert "computes in torch.float32" in patch.eligible(run_of("qwen2-tiny", dtype="float32"))
    with pytest.raises(UserError, match="fp8_mma and static_lora can't be on together"):
        select(["fp8_mma", "static_lora"])


def adapted(linear: nn.Linear, **settings) -> SimpleNamespace:
    model = nn.Sequential(linear.to(torch.bfloat16))
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"], **settings), model)
    return SimpleNamespace(
        model=model, dtype=torch.bfloat16, config=SimpleNamespace(method="lora"), device=torch.device("cpu")
    )


def test_layers_that_can_not_be_replaced_are_named():
    assert patch.eligible(adapted(nn.Linear(16, 32))) is None
    assert patch.eligible(adapted(nn.Linear(16, 24))) == "no adapted layer has sizes that are multiples of 16"
    assert patch.eligible(adapted(nn.Linear(16, 32), use_dora=True)).startswith("0 is of the variant Dora")
    training, merged, hooked = (adapted(nn.Linear(16, 32)) for _ in range(3))
    training.model[0].base_layer.requires_grad_()
    assert patch.eligible(training).startswith("0 trains its base")
    merged.model[0].merge()
    assert patch.eligible(merged).startswith("0 is merged")
    hooked.model[0].base_layer.register_forward_hook(lambda module, arguments, output: output)
    assert patch.eligible(hooked).startswith("0 has hooks")
    plain = adapted(nn.Linear(16, 32))
    plain.model = nn.Sequential(nn.Linear(16, 32))
    assert patch.eligible(plain) == "the run has no PEFT LoRA layers"
