"""static_lora: PEFT's layer and ours, bit for bit, and the swap on a model."""

from __future__ import annotations

from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn

from kernels.static_lora.kernel import StaticLora
from kernels.static_lora.patch import apply, eligible
from kernels.static_lora.reference import peft_layer
from loop.config import LoraConfig
from loop.lora import ADAPTER_CONFIG, ADAPTER_FILE, adapters, attach, save_adapters
from loop.model import trainable

IN, OUT, RANK = 48, 40, 6
DTYPES = (torch.float32, torch.bfloat16)


class Block(nn.Module):
    """Two projections with names that `attach` targets, one of them with a bias."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.q_proj = nn.Linear(IN, OUT, bias=True, dtype=dtype)
        self.o_proj = nn.Linear(OUT, IN, bias=False, dtype=dtype)
        self.other = nn.Linear(IN, IN, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.o_proj(self.q_proj(x).tanh()))


def adapted(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> tuple[Block, LoraConfig]:
    """A block with PEFT adapters whose B is not zero, so that every part matters."""
    torch.manual_seed(1)
    model, config = Block(dtype), LoraConfig(rank=RANK, alpha=9.0, dropout=dropout, targets=("q_proj", "o_proj"))
    attach(model, config, seed=2)
    with torch.no_grad():
        for adapter in adapters(model):
            adapter.b.normal_(std=0.3)
    return model, config


def with_settings(**settings) -> SimpleNamespace:
    """A run whose one projection PEFT adapted with these settings."""
    torch.manual_seed(3)
    model = Block()
    peft.inject_adapter_in_model(peft.LoraConfig(r=RANK, lora_alpha=9, target_modules=["q_proj"], **settings), model)
    return SimpleNamespace(model=model)


def outcome(module: nn.Module, parameters: list[torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradients of x and of `parameters`, and the random state after a seeded forward and backward."""
    torch.manual_seed(7)
    x = x.clone().requires_grad_()
    y = module(x)
    incoming = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], incoming), torch.get_rng_state()]


def assert_same_bits(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    for mine, theirs in zip(one, other, strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_layer_has_peft_s_bits(dtype, bias, dropout, training):
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    layer = peft_layer(base, torch.randn(RANK, IN), torch.randn(OUT, RANK), alpha=9.0, dropout=dropout).train(training)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    static = StaticLora(base, a, b, layer.scaling["default"], dropout).train(training)
    x = torch.randn(3, 7, IN).to(dtype)
    assert_same_bits(outcome(static, [a, b], x), outcome(layer, [a, b], x))
    dropped = not torch.equal(outcome(static, [a, b], x)[0], static.eval()(x))
    assert dropped is (dropout > 0 and training)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_swap_changes_no_bit_of_a_model(dtype, dropout):
    model, _ = adapted(dtype, dropout)
    run, x = SimpleNamespace(model=model), torch.randn(11, IN).to(dtype)
    before = outcome(model, list(trainable(model).values()), x)
    assert eligible(run) is None
    apply(run)
    assert sum(isinstance(module, StaticLora) for module in model.modules()) == 2
    assert_same_bits(outcome(model, list(trainable(model).values()), x), before)
    assert eligible(run) == "the run has no PEFT LoRA layers"


def test_the_swap_keeps_parameters_names_and_mode():
    model, _ = adapted()
    model.eval()
    before, everything = trainable(model), {id(parameter) for parameter in model.parameters()}
    apply(SimpleNamespace(model=model))
    after = trainable(model)
    assert list(after) == list(before) and len(after) == 4
    assert all(after[name] is parameter for name, parameter in before.items())
    assert {id(parameter) for parameter in model.parameters()} == everything
    assert not any(module.training for module in model.modules() if isinstance(module, StaticLora))


def test_the_swap_keeps_peft_s_files(tmp_path):
    model, config = adapted()
    for folder in ("before", "after"):
        (tmp_path / folder).mkdir()
        save_adapters(model, config, tmp_path / folder, "some/model")
        apply(SimpleNamespace(model=model))
    for name in (ADAPTER_FILE, ADAPTER_CONFIG):
        one, other = ((tmp_path / folder / name).read_bytes() for folder in ("before", "after"))
        assert one == other and len(one) > 100


def test_rslora_s_scaling_is_peft_s():
    run = with_settings(use_rslora=True)
    (adapter,) = adapters(run.model)
    assert adapter.scaling == pytest.approx(9 / RANK**0.5)
    with torch.no_grad():
        adapter.b.normal_()
    x, parameters = torch.randn(5, IN), [adapter.a, adapter.b]
    before = outcome(run.model, parameters, x)
    assert eligible(run) is None
    apply(run)
    assert_same_bits(outcome(run.model, parameters, x), before)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"use_dora": True}, "is of the variant Dora"), ({"lora_bias": True}, "has a bias in its adapter")],
    ids=["dora", "adapter bias"],
)
def test_refuses_what_is_more_than_plain_lora(settings, words):
    reason = eligible(with_settings(**settings))
    assert reason.startswith("q_proj ") and words in reason


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # PEFT's word on a second adapter, which is the point
def test_refuses_adapters_in_another_state():
    merged = with_settings()
    merged.model.q_proj.merge()
    assert "q_proj is merged" in eligible(merged)
    off = with_settings()
    off.model.q_proj.enable_adapters(False)
    assert "active" in eligible(off)
    two = with_settings()
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.inject_adapter_in_model(settings, two.model, adapter_name="second")
    two.model.q_proj.set_adapter(["default", "second"])
    assert "'second'" in eligible(two)
    narrow = with_settings()
    narrow.model.q_proj.lora_A["default"].to(torch.bfloat16)
    assert "another dtype" in eligible(narrow)


def test_refuses_a_model_without_adapters_and_mixed_dtypes():
    assert eligible(SimpleNamespace(model=Block())) == "the run has no PEFT LoRA layers"
    base = nn.Linear(IN, OUT)
    a, b = (nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in ((RANK, IN), (OUT, RANK)))
    with pytest.raises(ValueError, match="bfloat16"):
        StaticLora(base, a, b, 1.0, 0.0)
