"""silu_mul: the function on awkward inputs, and the module swap on the models that it is for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from abtest.opcheck import check_op
from kernels.contract import Op, Workload
from kernels.silu_mul import OPTIMIZATION
from kernels.silu_mul.kernel import silu_mul
from kernels.silu_mul.patch import FusedMLP, apply, eligible, gated_mlps, is_gated_silu_mlp
from kernels.silu_mul.reference import silu_mul_reference
from loop.model import hidden_fast_paths

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
LINEAR_HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}


def inputs_of_shape(*shape: int):
    def build(workload: Workload, device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator(device).manual_seed(seed)
        return tuple((2 * torch.randn(shape, generator=generator, device=device)).requires_grad_() for _ in range(2))

    return build


def op_with(inputs, candidate=silu_mul) -> tuple[Op, Workload]:
    workload = Workload("case", {}, dtype="float32", small=True)
    return Op(silu_mul_reference, candidate, inputs, (workload,), lambda w: 1, lambda w: 1), workload


@pytest.mark.parametrize("shape", [(1,), (7,), (1023,), (1025,), (3, 5, 11), (2, 1 << 16), (70_001,)], ids=str)
def test_shapes_that_no_block_divides(shape):
    report = check_op(*op_with(inputs_of_shape(*shape)), DEVICE)
    assert report.passed, report.verdict.reason


def test_scalars_and_empty_tensors():
    for shape in [(), (0,), (4, 0, 3)]:
        gate, up = torch.ones(shape, device=DEVICE, requires_grad=True), torch.ones(shape, device=DEVICE, requires_grad=True)
        y = silu_mul(gate, up)
        assert y.shape == gate.shape
        y.sum().backward()
        assert gate.grad.shape == up.grad.shape == gate.shape


def test_any_strides_in_and_contiguous_out():
    def halves_and_transposed(workload, device, seed):
        both = torch.randn(33, 2 * 40, generator=torch.Generator(device).manual_seed(seed), device=device)
        gate, _ = both.chunk(2, dim=-1)
        return gate.requires_grad_(), torch.randn(40, 33, device=device).copy_(both[:, 40:].t()).t().requires_grad_()

    op, workload = op_with(halves_and_transposed)
    gate, up = op.inputs(workload, DEVICE, 0)
    assert not gate.is_contiguous() and not up.is_contiguous()
    assert silu_mul(gate, up).is_contiguous()
    report = check_op(op, workload, DEVICE)
    assert report.passed, report.verdict.reason


def test_an_expanded_incoming_gradient():
    gate, up = (value.detach().double().requires_grad_() for value in inputs_of_shape(9, 50)(None, DEVICE, 3))
    silu_mul_reference(gate, up).sum().backward()  # sum sends one number, expanded
    ours = [value.detach().float().requires_grad_() for value in (gate, up)]
    silu_mul(*ours).sum().backward()
    for mine, truth in zip(ours, (gate, up), strict=True):
        torch.testing.assert_close(mine.grad.double(), truth.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy's word on it, in the interpreter
def test_flat_ends_of_the_sigmoid():
    gate = torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30], device=DEVICE, requires_grad=True)
    up = torch.full_like(gate, 3.0, requires_grad=True)
    theirs = torch.autograd.grad((want := silu_mul_reference(gate, up)).sum(), (gate, up))
    ours = torch.autograd.grad((got := silu_mul(gate, up)).sum(), (gate, up))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-30)


def test_refuses_what_it_cannot_compute():
    one = torch.ones(2, 3, device=DEVICE)
    with pytest.raises(ValueError, match=r"\[2, 3\].*\[3, 2\]"):
        silu_mul(one, one.reshape(3, 2))
    with pytest.raises(ValueError, match="float64"):
        silu_mul(one.double(), one.double())
    with pytest.raises(ValueError, match="agree in shape, dtype and device"):
        silu_mul(one, one.bfloat16())


def test_traces_without_a_graph_break():
    gate, up = inputs_of_shape(6, 20)(None, DEVICE, 0)
    compiled = torch.compile(lambda a, b: silu_mul(a + 1, b).square(), backend="aot_eager", fullgraph=True)
    theirs = torch.autograd.grad(silu_mul(gate + 1, up).square().sum(), (gate, up))
    torch.testing.assert_close(torch.autograd.grad(compiled(gate, up).sum(), (gate, up)), theirs)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.mem_get_info()[1] < 64 << 30, reason="needs a GPU with 64 GiB of memory"
)
def test_offsets_beyond_2_to_the_31():
    size = (1 << 31) + 4096
    gate, up, dy = (torch.full((size,), value, dtype=torch.bfloat16, device="cuda") for value in (1.0, 2.0, 0.5))
    for value in (gate, up, dy):
        value[-2048:] = -3.0
    tail = [value[-4096:].clone().requires_grad_() for value in (gate, up)]
    gate.requires_grad_(), up.requires_grad_()
    y = silu_mul(gate, up)
    grads = torch.autograd.grad(y, (gate, up), dy)
    want = silu_mul(*tail)
    for full, part in zip((y, *grads), (want, *torch.autograd.grad(want, tail, dy[-4096:])), strict=True):
        assert torch.equal(full[-4096:], part)
        assert torch.equal(full[:4096], full[-4096:-2048].repeat(2))


def build_model(family: str) -> nn.Module:
    with hidden_fast_paths():  # both sides on the pure-PyTorch path, whatever is installed
        import transformers

        causal_lm = getattr(transformers, f"{family}ForCausalLM")
    extra = {"Qwen3": {"head_dim": 8}, "Mistral": {"head_dim": 8, "sliding_window": None}}.get(family, {})
    if family == "Qwen3_5":
        config = transformers.Qwen3_5TextConfig(
            **SIZES,
            **HEADS,
            **LINEAR_HEADS,
            head_dim=8,
            layer_types=["linear_attention", "full_attention"],
            pad_token_id=None,
        )
    else:
        config = getattr(transformers, f"{family}Config")(**SIZES, **HEADS, **extra, pad_token_id=None)
    torch.manual_seed(0)
    return causal_lm(config).to(DEVICE)


@pytest.mark.parametrize("family", ["Qwen3_5", "Qwen3", "Qwen2", "Llama", "Mistral"])
def test_swap_keeps_the_checkpoint_and_the_function(family):
    model = build_model(family)
    run = SimpleNamespace(model=model, device=DEVICE)
    ids = torch.arange(12, device=DEVICE)[None]
    before, parameters = model.state_dict(), list(model.named_parameters())
    want = model(ids, labels=ids).loss
    wanted = torch.autograd.grad(want, [p for _, p in parameters])
    assert OPTIMIZATION.eligible(run) is None
    OPTIMIZATION.apply(run)
    assert sum(isinstance(module, FusedMLP) for module in model.modules()) == SIZES["num_hidden_layers"]
    assert list(model.state_dict()) == list(before)
    after = list(model.named_parameters())
    assert [name for name, _ in after] == [name for name, _ in parameters]
    assert all(one is other for (_, one), (_, other) in zip(after, parameters, strict=True))
    got = model(ids, labels=ids).loss
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(got, [p for _, p in parameters]), wanted, rtol=1e-3, atol=1e-6)
    assert "no MLP of the form" in OPTIMIZATION.eligible(run)


def test_swap_keeps_wrapped_projections_and_mode():
    model = build_model("Llama")
    for name in gated_mlps(model):
        mlp = model.get_submodule(name)
        mlp.up_proj = nn.Sequential(mlp.up_proj, nn.Dropout(0.5))  # stands for any wrapper, a LoRA layer say
    model.eval()
    ids = torch.arange(8, device=DEVICE)[None]
    want = model(ids).logits
    apply(SimpleNamespace(model=model, device=DEVICE))
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)


class GatedMLP(nn.Module):
    """The form that the swap looks for, with room for one deviation."""

    def __init__(self, activation: nn.Module | None = None, scale: float = 1.0):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.act_fn = activation or nn.SiLU()
        self.scale = scale

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * self.scale)


def test_only_the_exact_form_is_swapped():
    assert is_gated_silu_mlp(GatedMLP())
    assert not is_gated_silu_mlp(GatedMLP(nn.GELU()))
    assert not is_gated_silu_mlp(GatedMLP(scale=0.5))
    hooked = GatedMLP()
    hooked.register_forward_hook(lambda module, arguments, output: output)
    assert not is_gated_silu_mlp(hooked)
    with_more = GatedMLP()
    with_more.norm = nn.LayerNorm(8)
    assert not is_gated_silu_mlp(with_more)


def test_reasons_are_in_words(monkeypatch):
    plain = SimpleNamespace(model=nn.Sequential(nn.Linear(2, 2)), device=DEVICE)
    assert eligible(plain) == "Sequential has no MLP of the form down_proj(silu(gate_proj(x)) * up_proj(x))"
    with pytest.raises(ValueError, match="Sequential"):
        apply(plain)
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    reason = eligible(SimpleNamespace(model=GatedMLP(), device=torch.device("cpu")))
    assert "TRITON_INTERPRET=1" in reason
