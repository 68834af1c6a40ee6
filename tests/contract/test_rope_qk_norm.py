"""rope_qk_norm: the function on awkward inputs, what it leaves out, and the swap on the models that it is for."""

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
from kernels.registry import enable
from kernels.rope_qk_norm import OPTIMIZATION, kernel
from kernels.rope_qk_norm.kernel import rope_qk_norm
from kernels.rope_qk_norm.layer import FusedQkAttention
from kernels.rope_qk_norm.op import rope_op
from kernels.rope_qk_norm.patch import FORMS, apply, attentions, eligible
from kernels.rope_qk_norm.reference import EPS
from loop.config import Config, DataConfig, LoraConfig
from loop.run import Run
from loop.training import build

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NORMS = pytest.mark.parametrize("zero_centred", [True, False], ids=["zero-centred", "plain"])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).requires_grad_()


def inputs_of(B: int, L: int, H: int, KV: int, D: int) -> list[Tensor]:
    """query, key and both weights."""
    weights = [(1.0 + 0.3 * drawn(D, seed=seed).detach()).requires_grad_() for seed in (2, 3)]
    return [drawn(B, L, H, D), drawn(B, L, KV, D, seed=1), *weights]


def angles_of(B: int, L: int, R: int) -> list[Tensor]:
    """cos and sin whose halves are not the same, as they are in models: any mix-up shows."""
    angle = 3.0 * drawn(B, L, R, seed=8).detach()
    return [angle.cos(), angle.sin()]


def incoming_of(query: Tensor, key: Tensor) -> list[Tensor]:
    return [drawn(*x.shape, seed=seed).detach() for x, seed in ((query, 5), (key, 6))]


def textbook(query, key, q_weight, k_weight, cos, sin, zero_centred: bool = True) -> list[Tensor]:
    """Column by column."""
    outputs, half = [], cos.shape[-1] // 2
    for x, weight in ((query, q_weight), (key, k_weight)):
        x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * (weight + zero_centred)
        columns = list(x.unbind(-1))
        for d in range(half):
            low, high = x[..., d], x[..., d + half]
            c, s = (side.unsqueeze(2) for side in (cos, sin))
            columns[d] = low * c[..., d] - high * s[..., d]
            columns[d + half] = high * c[..., d + half] + low * s[..., d + half]
        outputs.append(torch.stack(columns, dim=-1))
    return outputs


def ours(query, key, q_weight, k_weight, cos, sin, zero_centred: bool = True) -> tuple[Tensor, Tensor]:
    return rope_qk_norm(query, key, q_weight, k_weight, cos, sin, EPS, zero_centred)


def results(function, inputs, angles, incoming, zero_centred=True, prepare=lambda *values: values) -> list[Tensor]:
    outputs = function(*prepare(*inputs), *angles, zero_centred)
    return [*outputs, *torch.autograd.grad(outputs, inputs, [g.to(y.dtype) for g, y in zip(incoming, outputs, strict=True)])]


def assert_near_truth(inputs, angles, incoming, zero_centred=True, prepare=lambda *values: values) -> None:
    """Outputs and all gradients in fp32, beside the textbook's in fp64; `prepare` makes views of inputs."""
    raised = [x.detach().double().requires_grad_() for x in inputs], [x.double() for x in angles]
    want = results(textbook, *raised, incoming, zero_centred, prepare)
    for mine, exact in zip(results(ours, inputs, angles, incoming, zero_centred, prepare), want, strict=True):
        torch.testing.assert_close(mine, exact.float(), rtol=1e-5, atol=1e-5)


@NORMS
@pytest.mark.parametrize("sizes", [(29, 3, 2, 40, 10), (17, 1, 1, 33, 2), (45, 5, 3, 24, 24), (6, 2, 1, 300, 102)], ids=str)
def test_shapes_that_no_block_divides(sizes, zero_centred):
    shape = dict(zip(("T", "H", "KV", "D", "R"), sizes, strict=True)) | {"trained": 1, "gated": 1}
    workload = Workload("case", shape | {"zero_centred": int(zero_centred)}, "float32", small=True)
    report = check_op(rope_op(workload), workload, DEVICE)
    assert report.passed, report.verdict.reason


@pytest.mark.parametrize("R", [2, 6, 14, 26])
@pytest.mark.parametrize(("B", "L", "H", "KV"), [(1, 1, 1, 1), (1, 7, 3, 1), (2, 5, 2, 2), (3, 11, 4, 2)], ids=str)
def test_rows_shared_out_over_programs_and_tiles(B, L, H, KV, R, monkeypatch):
    for constant in ("TILE", "TILE_DWEIGHT", "TILE_INTERPRETED"):
        monkeypatch.setattr(kernel, constant, 64)
    monkeypatch.setattr(kernel, "WARPS_DWEIGHT", 3)
    inputs = inputs_of(B, L, H, KV, 27)
    assert_near_truth(inputs, angles_of(B, L, R), incoming_of(*inputs[:2]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("D", [8, 128, 256, 2048, 4096])
def test_tiles_fetched_ahead_fit_in_shared_memory(D, dtype, monkeypatch):
    monkeypatch.setattr(kernel, "TILE_INTERPRETED", kernel.TILE_DWEIGHT)
    tile = kernel.tiling(D, D // 4, True)
    stages = kernel.stages(tile, dtype)
    assert 1 <= stages <= kernel.STAGES and (stages - 1) * 4 * tile["BT"] * 2 * tile["BH"] * dtype.itemsize <= 48 * 1024
    assert D > 256 or dtype is torch.float32 or stages == kernel.STAGES


@pytest.mark.parametrize(("D", "J", "vector"), [(256, 32, 16), (128, 64, 16), (24, 4, 4), (27, 3, 1), (44, 6, 2)])
def test_halves_of_a_head_hold_every_column_once(D, J, vector):
    tile = kernel.tiling(D, J, False)
    low = [i if i < J else i + J for i in range(tile["HALF"])]
    high = [i + J if i < J else i + tile["HALF"] for i in range(D - tile["HALF"])]
    assert sorted(low + high) == list(range(D)) and tile["BH"] >= tile["HALF"] >= D - tile["HALF"] >= J
    assert tile["VEC"] == vector and all(half[i] + 1 == half[i + 1] for half in (low, high)
                                         for i in range(len(half) - 1) if (i + 1) % vector)  # fmt: skip


@NORMS
def test_a_query_beside_its_gate_is_read_in_place(zero_centred):
    both, key, *weights = inputs_of(2, 6, 3, 1, 16)
    both = drawn(2, 6, 3, 32)
    query = both.chunk(2, dim=-1)[0]
    assert kernel._by_position(query).data_ptr() == query.data_ptr()
    assert all(y.is_contiguous() for y in ours(query, key, *weights, *angles_of(2, 6, 8), zero_centred))

    def prepare(both: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        return both.chunk(2, dim=-1)[0], *others

    assert_near_truth([both, key, *weights], angles_of(2, 6, 8), incoming_of(query, key), zero_centred, prepare)


def test_transposed_expanded_and_strided():
    """Attention hands back gradients with heads before positions; angles of one row serve all rows."""
    inputs, angles = inputs_of(2, 6, 4, 2, 16), angles_of(1, 6, 4)
    incoming = [
        drawn(*x.transpose(1, 2).shape, seed=seed).detach().transpose(1, 2) for x, seed in zip(inputs, (5, 6), strict=False)
    ]
    assert not incoming[0].is_contiguous()
    assert_near_truth(inputs, angles, incoming)
    assert_near_truth(inputs, angles, [torch.full((1, 1, 1, 1), 0.5, device=DEVICE).expand(x.shape) for x in inputs[:2]])
    turned = [inputs[0].detach().transpose(1, 3).contiguous().requires_grad_(), *inputs[1:]]

    def prepare(query: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        return query.transpose(1, 3), *others

    assert_near_truth(turned, angles, incoming, prepare=prepare)


def test_one_output_is_used():
    inputs, angles = inputs_of(1, 5, 2, 1, 12), angles_of(1, 5, 6)
    for index in range(2):
        outputs = [function(*inputs, *angles)[index] for function in (ours, textbook)]
        got, want = (
            torch.autograd.grad(output.sum(), inputs, allow_unused=True, materialize_grads=True) for output in outputs
        )
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_frozen_weights_have_no_gradient_computed(monkeypatch):
    inputs, angles = inputs_of(1, 9, 2, 1, 24), angles_of(1, 9, 6)
    query, key, *weights = inputs
    incoming = incoming_of(query, key)
    want = torch.autograd.grad(ours(*inputs, *angles), (query, key, weights[1]), incoming)
    alone = torch.autograd.grad(ours(query, key, weights[0].detach(), weights[1], *angles), (key, weights[1]), incoming)
    assert torch.equal(alone[1], want[2])  # one trained norm of two
    monkeypatch.setattr(kernel.device, "reduce_kernel", None)  # whoever adds up partial sums fails
    with pytest.raises(TypeError):
        torch.autograd.grad(ours(*inputs, *angles), weights, incoming)
    got = torch.autograd.grad(ours(query, key, *(w.detach() for w in weights), *angles), (query, key), incoming)
    torch.testing.assert_close(got, want[:2], rtol=1e-6, atol=1e-6)


def test_keeps_its_inputs_and_one_number_a_head():
    inputs, angles, kept = inputs_of(1, 5, 4, 2, 24), angles_of(1, 5, 6), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        ours(*inputs, *angles)
    assert [value.data_ptr() for value in kept[:6]] == [value.data_ptr() for value in (*inputs, *angles)]
    assert [(value.shape, value.dtype) for value in kept[6:]] == [((1, 5, 4), torch.float32), ((1, 5, 2), torch.float32)]


def test_a_second_call_has_the_same_bits_and_positions_do_not_meet():
    inputs, angles = inputs_of(1, 300, 2, 1, 16), angles_of(1, 300, 4)
    incoming = incoming_of(*inputs[:2])
    first, second = (results(ours, inputs, angles, incoming) for _ in range(2))
    assert all(map(same_bits, first, second))
    part = slice(131, 164)
    own = [x.detach()[:, part].clone().requires_grad_() for x in inputs[:2]] + inputs[2:]
    alone = results(ours, own, [x[:, part] for x in angles], [x[:, part] for x in incoming])
    assert all(same_bits(whole[:, part], one) for whole, one in zip(first[:4], alone[:4], strict=True))


@pytest.mark.parametrize("shape", [(1, 4, 2, 1, 24), (2, 3, 3, 3, 7), (1, 0, 2, 1, 8)], ids=str)
def test_the_custom_ops_are_well_behaved(shape):
    B, L, H, KV, _ = shape
    inputs, angles = inputs_of(*shape), angles_of(B, L, 4)
    plain, rstd = [x.detach() for x in inputs], [torch.rand(B, L, heads, device=DEVICE) for heads in (H, KV)]
    backward = (*incoming_of(*plain[:2]), *plain, *angles, *rstd, True)
    for operator, arguments in (
        (torch.ops.isoloss.rope_qk_norm.default, (*inputs, *angles, EPS, True)),
        (torch.ops.isoloss.rope_qk_norm_backward.default, (*backward, True)),
        (torch.ops.isoloss.rope_qk_norm_backward.default, (*backward, False)),
    ):
        outcome = torch.library.opcheck(operator, arguments)
        assert set(outcome.values()) == {"SUCCESS"}, outcome


def test_no_positions_still_give_a_gradient():
    inputs = inputs_of(1, 0, 2, 1, 8)
    *_, dqw, dkw = results(ours, inputs, angles_of(1, 0, 4), incoming_of(*inputs[:2]))
    assert torch.equal(dqw, torch.zeros(8, device=DEVICE)) and torch.equal(dkw, torch.zeros(8, device=DEVICE))


def test_refuses_what_it_cannot_compute():
    (query, key, q_weight, k_weight), (cos, sin) = inputs_of(1, 3, 2, 1, 8), angles_of(1, 3, 4)
    with pytest.raises(ValueError, match=r"\[1, 3, 2, 8\] and key \[1, 2, 1, 8\]"):
        ours(query, key[:, :2], q_weight, k_weight, cos, sin)
    with pytest.raises(ValueError, match=r"heads of 8 .* not \[7\] and \[8\]"):
        ours(query, key, q_weight[:7], k_weight, cos, sin)
    with pytest.raises(ValueError, match=r"cos and sin are \[1, 3, 3\]"):
        ours(query, key, q_weight, k_weight, cos[..., :3], sin[..., :3])
    with pytest.raises(ValueError, match=r"\[1, 2, 4\].*\[1, 3, R\] with an even R up to 8"):
        ours(query, key, q_weight, k_weight, cos[:, :2], sin[:, :2])
    with pytest.raises(ValueError, match=r"one device and one of .*bfloat16"):
        ours(query, key, q_weight.bfloat16(), k_weight, cos, sin)


def test_least_work():
    op, (frozen, trained, *_) = OPTIMIZATION.op, OPTIMIZATION.op.workloads
    T, rows, D = 5376, 5376 * 10, 256
    assert op.bytes_moved(frozen) == 2 * (5 * rows * D + 4 * T * 64 + 4 * D) + 2 * 4 * rows
    assert op.flops(frozen) == rows * (13 * D + 6 * 64)
    assert op.bytes_moved(trained) - op.bytes_moved(frozen) == 2 * 2 * D
    assert op.flops(trained) - op.flops(frozen) == 2 * rows * D


def built(model: str, method: str = "full", checkpointing: bool = False) -> tuple[Run, object]:
    """A loop-built run whose head norms are not at their neutral values, and a batch."""
    where = {"device": DEVICE.type, "dtype": "float32", "gradient_checkpointing": checkpointing}
    settings = {"repeatable_attention": True, "lora": LoraConfig(rank=4, alpha=8.0), "data": DataConfig(pack_length=96)}
    run, dataset = build(Config(model=model, method=method, **where, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in attentions(run.model):
            layer = run.model.get_submodule(name)
            for norm in (layer.q_norm, layer.k_norm):
                norm.weight += 0.3 * torch.randn(norm.weight.shape, generator=generator).to(DEVICE)
    return run, dataset.micro_batches(0, 1, 1)[0].to(run.device)


@pytest.mark.parametrize(("method", "checkpointing"), [("full", False), ("lora", True)], ids=["full", "lora"])
@pytest.mark.parametrize(("model", "count"), [("qwen3.5-tiny", 1), ("qwen3-tiny", 4)])
def test_models_train_as_before(model, count, method, checkpointing):
    run, batch = built(model, method, checkpointing)
    names, before = list(attentions(run.model)), dict(run.model.named_parameters())
    assert len(names) == count and len(batch.lengths) > 1
    state, stock = list(run.model.state_dict()), step(run, batch)
    assert eligible(run) is None
    apply(run)
    layers = [run.model.get_submodule(name) for name in names]
    assert all(isinstance(layer, FusedQkAttention) and layer.training for layer in layers)
    after = dict(run.model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert list(run.model.state_dict()) == state
    changed = step(run, batch)
    assert changed.keys() == stock.keys() and len(stock) > 10
    error, where = worst_error(changed, stock)
    assert 0 < error <= 1e-4, where
    assert "has no attention of the kinds" in eligible(run)
    with pytest.raises(ValueError, match="to replace"):
        apply(run)


@pytest.mark.parametrize("model", ["qwen3.5-tiny", "qwen3-tiny"])
@pytest.mark.parametrize("other", ["packed_attention", "rms_norm", "lora_matmul"])
def test_trains_as_before_beside(other, model, monkeypatch):
    run, batch = built(model, "lora")
    stock = step(run, batch)
    enable(run, ["rope_qk_norm", other])
    assert set(run.enabled) == {"rope_qk_norm", other}, run.refused
    layers = [module for module in run.model.modules() if isinstance(module, FusedQkAttention)]
    for layer in layers:
        for norm in (layer.q_norm, layer.k_norm):
            monkeypatch.setattr(norm, "forward", None)  # whoever calls a norm that is left out fails
    error, where = worst_error(step(run, batch), stock)
    assert 0 < error <= 1e-4, where
    assert layers and (other != "packed_attention" or run.model.config._attn_implementation == "packed_attention")


@pytest.mark.parametrize("model", ["llama-tiny", "qwen2-tiny"])
def test_models_without_such_attention_are_told_why(model):
    run, _ = built(model)
    assert eligible(run).endswith("has no attention of the kinds Qwen3_5Attention, Qwen3Attention")


def renamed(layer: nn.Module, **changes) -> type:
    """A class of the layer's own name with other methods."""
    return type(type(layer).__name__, (type(layer),), changes)


def test_only_attention_that_computes_this_is_swapped():
    run, _ = built("qwen3.5-tiny")
    (name,) = attentions(run.model)
    layer = run.model.get_submodule(name)
    kind, original = type(layer), type(layer).forward

    def scaled(self, hidden_states, *arguments, **keywords):
        out, weights = original(self, hidden_states, *arguments, **keywords)
        return out * 1.0001, weights

    def turned_back(self, hidden_states, position_embeddings, *arguments, **keywords):
        cos, sin = position_embeddings
        return original(self, hidden_states, (cos, -sin), *arguments, **keywords)

    for forward in (scaled, turned_back):
        layer.__class__ = renamed(layer, forward=forward)
        assert (
            eligible(run) == f"{name} computes something else than transformers' attention of that name, or in another order"
        )
        layer.__class__ = kind
    assert eligible(run) is None
    layer.extra = nn.Identity()
    assert eligible(run) == f"{name} is not put together as transformers' attention of that name"
    del layer.extra
    norm = layer.q_norm
    layer.q_norm = nn.RMSNorm(32, eps=norm.eps)  # times weight, not 1 + weight
    assert eligible(run) == f"{name} has a q_norm that is no plain RMSNorm over 32, or carries hooks"
    layer.q_norm = norm
    handle = norm.register_forward_hook(lambda module, arguments, output: output)
    assert "q_norm" in eligible(run)
    handle.remove()
    norm.eps = 1e-5
    assert eligible(run) == f"{name} has norms with 1e-05 and 1e-06; the kernel takes one epsilon"


def test_reasons_are_in_words(monkeypatch):
    run, _ = built("qwen3-tiny")
    asked = SimpleNamespace(model=run.model, device=run.device, dtype=torch.bfloat16)
    assert eligible(asked) == (
        "model.layers.0.self_attn has norm weights in torch.float32, but the run computes in torch.bfloat16; "
        "the kernel takes one dtype"
    )
    asked.dtype = torch.float64
    assert "the kernel takes torch.bfloat16" in eligible(asked)
    assert FORMS.keys() == {"Qwen3_5Attention", "Qwen3Attention"}
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    assert "TRITON_INTERPRET=1" in eligible(SimpleNamespace(model=run.model, device=torch.device("cpu")))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.mem_get_info()[1] < 64 << 30, reason="needs a GPU with 64 GiB of memory"
)
def test_offsets_beyond_2_to_the_31():
    T, H, D = (1 << 20) + 64, 9, 256
    query = torch.randn(1, 64, H, D, device="cuda").bfloat16().repeat(1, T // 64, 1, 1).requires_grad_()
    key = query.detach()[:, :, :1].requires_grad_()
    weight = torch.zeros(D, device="cuda").bfloat16()
    cos, sin = (torch.randn(1, 64, 64, device="cuda").bfloat16().repeat(1, T // 64, 1) for _ in range(2))
    outputs = ours(query, key, weight, weight, cos, sin)
    gradients = torch.autograd.grad(outputs, (query, key), [torch.ones_like(output) for output in outputs])
    for value in (*outputs, *gradients):
        assert torch.equal(value[:, -64:], value[:, :64])
