"""conv_silu_norm: the function on awkward packs, what it leaves out, and the swap under both delta rules."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from micro_steps import step
from torch import Tensor, nn

from abtest.opcheck import check_op
from abtest.oracle import worst_error
from abtest.quantity import same_bits
from abtest.verdict import Level
from kernels.contract import Workload
from kernels.conv_silu_norm import OPTIMIZATION, kernel
from kernels.conv_silu_norm.kernel import conv_silu_norm
from kernels.conv_silu_norm.op import mixer_op
from kernels.conv_silu_norm.patch import ConvSiluNorm, apply, eligible, mixing_layers
from kernels.conv_silu_norm.reference import EPS
from loop.config import Config, DataConfig, LoraConfig
from loop.delta_net import Pack, PackedDeltaNet
from loop.run import Run
from loop.training import build

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ONE_TOKEN = (1,) * 9 + (2, 1, 3, 1, 5)
COMPILE = """
import sys
from pathlib import Path
from bench.cross_compile.compilers import with_triton
from kernels.conv_silu_norm.cross_compile import CASES
for case in CASES:
    if case.name in sys.argv[2:]:
        with_triton(case, "sm_90a", Path(sys.argv[1], case.name))
"""
LOOPS = ("backward with dw, fp32", "forward, fp32")
PRODUCTS = ("forward, bf16", "backward with dw, bf16")


def pack_of(*lengths: int) -> Pack:
    return Pack(torch.tensor((0, *lengths), device=DEVICE).cumsum(0, dtype=torch.int32), lengths)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).requires_grad_()


def textbook(x: Tensor, weight: Tensor, pack: Pack, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Document by document, tap by tap."""
    parts = []
    for document in x.split(pack.lengths):
        padded = torch.cat([document.new_zeros(3, x.shape[1]), document])
        pre = sum(padded[tap : tap + len(document)] * weight[:, tap] for tap in range(4))
        parts.append(pre * torch.sigmoid(pre))
    q, k, v = torch.cat(parts).split([heads * width, heads * width, x.shape[1] - 2 * heads * width], dim=1)
    q, k = (side.unflatten(1, (heads, width)) for side in (q, k))
    q, k = (side / (side.square().sum(-1, keepdim=True) + EPS).sqrt() for side in (q, k))
    return q, k, v


def ours(x: Tensor, weight: Tensor, pack: Pack, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return conv_silu_norm(x, weight, pack.starts, heads, width, EPS)


def results(function, inputs: list[Tensor], incoming: list[Tensor], *others, prepare=lambda *values: values) -> list[Tensor]:
    outputs = function(*prepare(*inputs), *others)
    sent = [gradient.to(output.dtype) for gradient, output in zip(incoming, outputs, strict=True)]
    return [*outputs, *torch.autograd.grad(outputs, inputs, sent)]


def assert_near_truth(inputs: list[Tensor], incoming: list[Tensor], *others, prepare=lambda *values: values) -> None:
    """Outputs and both gradients in fp32, beside the textbook's in fp64; `prepare` makes views of inputs."""
    got = results(ours, inputs, incoming, *others, prepare=prepare)
    want = results(textbook, [x.detach().double().requires_grad_() for x in inputs], incoming, *others, prepare=prepare)
    for mine, exact in zip(got, want, strict=True):
        torch.testing.assert_close(mine, exact.float(), rtol=2e-5, atol=2e-5)


def inputs_of(T: int, heads: int, width: int, values: int) -> tuple[list[Tensor], list[Tensor]]:
    """x and weight; what comes in from behind."""
    C = 2 * heads * width + values
    incoming = [drawn(T, heads, width, seed=2), drawn(T, heads, width, seed=3), drawn(T, values, seed=4)]
    return [drawn(T, C), drawn(C, 4, seed=1)], [gradient.detach() for gradient in incoming]


def case(documents: tuple[int, ...], HK: int, K: int, V: int) -> tuple[Workload, tuple[int, ...]]:
    return Workload("case", {"T": sum(documents), "HK": HK, "K": K, "V": V, "trained": 1}, "float32", small=True), documents


@pytest.mark.parametrize(
    ("documents", "HK", "K", "V"), [((23, 1, 14), 3, 13, 29), (ONE_TOKEN, 1, 33, 7), ((33,), 5, 8, 1)], ids=str
)
def test_shapes_that_no_block_divides(documents, HK, K, V):
    workload, lengths = case(documents, HK, K, V)
    report = check_op(mixer_op((workload, lengths)), workload, DEVICE)
    assert report.passed, report.verdict.reason


@pytest.fixture(params=[2, 4], ids=["two rows a step", "four rows a step"])
def tiled_as_on_a_gpu(request, monkeypatch):
    """The interpreter gets programs as a GPU does: of four heads, in several groups, and of one chunk of rows."""
    monkeypatch.setattr(kernel, "INTERPRETED", False)
    walk = kernel.Walk(warps=8, heads_of_columns=32, unroll=request.param)
    for name in ("FORWARD", "BACKWARD", "BACKWARD_DWEIGHT"):
        monkeypatch.setattr(kernel, name, {False: walk, True: walk})
    tile = kernel.backward_tiling(40, 2, 8, 20, torch.float32, True)
    assert (tile["BH"], tile["GROUPS"], tile["CHUNKS"], tile["rows"]) == (4, 3, 1, 16)


@pytest.mark.parametrize("tiled_as_on_a_gpu", [4], indirect=True, ids=["four rows a step"])  # two: by the tests below
def test_the_op_check_passes_with_the_tiles_of_a_gpu(tiled_as_on_a_gpu):
    (workload,) = (workload for workload in OPTIMIZATION.op.workloads if workload.name == "small, documents of 1 to 5")
    report = check_op(OPTIMIZATION.op, workload, DEVICE)
    assert report.passed, report.verdict.reason


@pytest.mark.parametrize("documents", [(1,), (2,), (3,), (4, 1), (1, 1, 1, 1), (5, 8, 2, 1, 9), ONE_TOKEN], ids=str)
@pytest.mark.parametrize("chunks", [1, 2], ids=["alone", "side by side"])
def test_rows_shared_out_over_chunks(documents, chunks, monkeypatch):
    """Chunks of four rows, the fewest there can be: what they read of others, and what is behind the last row."""
    for constant in ("FEWEST_ROWS", "FEWEST_ROWS_INTERPRETED"):
        monkeypatch.setattr(kernel, constant, 4)
    monkeypatch.setattr(kernel, "TILE_INTERPRETED", 32 * chunks)  # chunks of 4 heads of 8
    assert_near_truth(*inputs_of(sum(documents), 2, 8, 20), pack_of(*documents), 2, 8)


@pytest.mark.parametrize("documents", [(2,), (5, 8, 2, 1, 9), ONE_TOKEN], ids=str)
@pytest.mark.parametrize(("HK", "V"), [(2, 20), (6, 44)], ids=["a group", "groups"])
def test_rows_shared_out_with_the_tiles_of_a_gpu(documents, HK, V, tiled_as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(kernel, "FEWEST_ROWS", 4)
    assert_near_truth(*inputs_of(sum(documents), HK, 8, V), pack_of(*documents), HK, 8)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, str]:
    """What Triton makes of cases for an H200, before LLVM has seen it."""
    folder = tmp_path_factory.mktemp("compiled")
    where = {"env": os.environ | {"TRITON_INTERPRET": "0"}, "cwd": Path(kernel.__file__).parents[2]}
    words = [sys.executable, "-c", COMPILE, str(folder), *LOOPS, *PRODUCTS]
    done = subprocess.run(words, **where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    codes = {path.relative_to(folder).parts[0]: path.read_text(encoding="utf-8") for path in folder.rglob("*_kernel.ttir")}
    assert codes.keys() == {*LOOPS, *PRODUCTS}
    return codes


def test_the_compiled_walks_hand_on_every_row(compiled):
    """Triton decides which names a loop carries from one step to the next; its interpreter, which runs Python, does not."""
    loops = [re.findall(r"scf\.for .* -> \((.*)\) +: i32 \{", compiled[name]) for name in LOOPS]
    carried = [Counter(re.findall(r"tensor<1x128xf\d\d>", values)) for values in itertools.chain(*loops)]
    rows, sums = {"tensor<1x128xf32>": 3 + 3}, {"tensor<1x128xf64>": 4}  # of x and of dp; of dw
    forward = {"tensor<1x128xf32>": 3}
    assert sorted(carried, key=len) == [forward, forward, rows | sums, rows | sums]  # for q and k, and for v


def test_no_product_is_left_for_the_compiler_to_fuse(compiled):
    """It would choose for each place in a step alone, so that a row's bits would differ from place to place."""
    for code in (compiled[name] for name in PRODUCTS):
        products = set(re.findall(r"(%\S+) = arith\.mulf", code))
        sums = re.findall(r'(?:arith\.(?:addf|subf)|"tt\.reduce")\(?(.*)', code)
        assert products and sums and not any(products & set(re.findall(r"%\w+", line)) for line in sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_document_has_the_bits_that_it_has_alone(dtype):
    documents = (37, 1, 1, 18, 40)
    inputs, incoming = inputs_of(sum(documents), 2, 16, 24)
    inputs, incoming = ([value.detach().to(dtype).requires_grad_() for value in values] for values in (inputs, incoming))
    whole = results(ours, inputs, incoming, pack_of(*documents), 2, 16)
    start = 0
    for length in documents:
        part = slice(start, start + length)
        one = [inputs[0].detach()[part].clone().requires_grad_(), inputs[1]]
        alone = results(ours, one, [gradient[part].clone() for gradient in incoming], pack_of(length), 2, 16)
        assert all(same_bits(both[part], own) for both, own in zip(whole[:4], alone[:4], strict=True))
        start += length


def test_nothing_of_another_document_gets_through():
    """Not even NaN, which a product with zero would let pass."""
    documents = (5, 2, 6)
    inputs, incoming = inputs_of(13, 1, 8, 8)
    before = results(ours, inputs, incoming, pack_of(*documents), 1, 8)
    with torch.no_grad():
        inputs[0][5:7] = torch.nan
    after = results(ours, inputs, incoming, pack_of(*documents), 1, 8)
    for one, other in zip(before[:4], after[:4], strict=True):
        assert torch.equal(one[:5], other[:5]) and torch.equal(one[7:], other[7:]) and bool(other[5:7].isnan().all())


def test_the_op_check_sees_a_leak_between_documents():
    def leaking(x, weight, pack, heads, width):
        joined = replace(pack, cu_seqlens=pack.cu_seqlens[[0, -1]], lengths=(sum(pack.lengths),))
        return op.candidate(x, weight, joined, heads, width)

    workload, lengths = case((9, 8), 1, 8, 8)
    op = mixer_op((workload, lengths))
    assert check_op(replace(op, candidate=leaking), workload, DEVICE).verdict.level is Level.FAILED


def test_a_second_call_has_the_same_bits():
    inputs, incoming = inputs_of(70, 2, 16, 24)
    first, second = (results(ours, inputs, incoming, pack_of(31, 39), 2, 16) for _ in range(2))
    assert all(map(same_bits, first, second))


def test_slices_and_strided_gradients():
    """x out of a wider projection is read in place."""
    (x, weight), incoming = inputs_of(12, 2, 8, 16)
    wide, pack = drawn(12, 100, seed=7), pack_of(7, 5)
    slice_of = wide[:, 20:68]
    assert kernel._rows(slice_of).data_ptr() == slice_of.data_ptr()
    assert_near_truth([wide, weight], incoming, pack, 2, 8, prepare=lambda wide, weight: (wide[:, 20:68], weight))
    strided = [gradient.transpose(0, -1).contiguous().transpose(0, -1) for gradient in incoming]
    assert not any(gradient.is_contiguous() for gradient in strided)
    turned = [x.detach().t().contiguous().requires_grad_(), weight.detach().t().contiguous().requires_grad_()]
    assert_near_truth(turned, strided, pack, 2, 8, prepare=lambda x, weight: (x.t(), weight.t()))


def test_one_output_is_used():
    inputs, incoming = inputs_of(9, 2, 8, 16)
    pack = pack_of(4, 5)
    for index in range(3):
        pairs = [function(*inputs, pack, 2, 8)[index] for function in (ours, textbook)]
        got, want = (torch.autograd.grad(output, inputs, incoming[index]) for output in pairs)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_heads_of_zeros_are_finite():
    inputs, incoming = inputs_of(6, 1, 8, 8)
    with torch.no_grad():
        inputs[0][:, :8] = 0.0
    assert all(bool(torch.isfinite(value).all()) for value in results(ours, inputs, incoming, pack_of(6), 1, 8))


def test_a_frozen_weight_has_no_gradient_computed(monkeypatch):
    (x, weight), incoming = inputs_of(20, 2, 8, 16)
    pack = pack_of(20)
    want = torch.autograd.grad(ours(x, weight, pack, 2, 8), x, incoming)[0]
    monkeypatch.setattr(kernel.backward, "reduce_kernel", None)  # whoever adds up partial sums fails
    with pytest.raises(TypeError):
        torch.autograd.grad(ours(x, weight, pack, 2, 8), weight, incoming)
    got = torch.autograd.grad(ours(x, weight.detach(), pack, 2, 8), x, incoming)[0]
    assert torch.equal(got, want)


def test_keeps_x_and_one_number_a_head():
    (x, weight), _ = inputs_of(6, 2, 8, 16)
    kept: list[Tensor] = []
    pack = pack_of(2, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        ours(x, weight, pack, 2, 8)
    assert [value.data_ptr() for value in kept[:3]] == [value.data_ptr() for value in (x, weight, pack.starts)]
    assert [(value.shape, value.dtype) for value in kept[3:]] == [((6, 4), torch.float32)]


@pytest.mark.parametrize("T", [0, 1, 7])
def test_the_custom_ops_are_well_behaved(T):
    (x, weight), incoming = inputs_of(T, 2, 8, 12)
    starts, rstd = torch.zeros(T, dtype=torch.int32, device=DEVICE), torch.rand(T, 4, device=DEVICE)
    plain = x.detach(), weight.detach()
    for operator, arguments in (
        (torch.ops.isoloss.conv_silu_norm.default, (x, weight, starts, 2, 8, EPS)),
        (torch.ops.isoloss.conv_silu_norm_backward.default, (*incoming, *plain, starts, rstd, True)),
        (torch.ops.isoloss.conv_silu_norm_backward.default, (*incoming, *plain, starts, rstd, False)),
    ):
        outcome = torch.library.opcheck(operator, arguments)
        assert set(outcome.values()) == {"SUCCESS"}, outcome


def test_no_rows_still_give_a_gradient():
    inputs, incoming = inputs_of(0, 1, 8, 8)
    *_, dx, dweight = results(ours, inputs, incoming, pack_of(), 1, 8)
    assert dx.shape == (0, 24) and torch.equal(dweight, torch.zeros(24, 4, device=DEVICE))


def test_starts_are_where_documents_begin():
    assert pack_of(3, 1, 2).starts.tolist() == [0, 0, 0, 3, 4, 4]
    assert pack_of(3, 1, 2).starts.dtype == torch.int32


def test_refuses_what_it_cannot_compute():
    (x, weight), _ = inputs_of(4, 1, 8, 8)
    starts = pack_of(4).starts
    with pytest.raises(ValueError, match=r"\[4, 24\], \[24, 3\] and \[4\]; \[T, C\]"):
        conv_silu_norm(x, weight[:, :3], starts, 1, 8, EPS)
    with pytest.raises(ValueError, match=r"and \[3\]"):
        conv_silu_norm(x, weight, starts[:3], 1, 8, EPS)
    with pytest.raises(ValueError, match=r"weight torch\.bfloat16"):
        conv_silu_norm(x, weight.bfloat16(), starts, 1, 8, EPS)
    with pytest.raises(ValueError, match="float64"):
        conv_silu_norm(x.double(), weight.double(), starts, 1, 8, EPS)
    with pytest.raises(ValueError, match=r"starts torch\.int64"):
        conv_silu_norm(x, weight, starts.long(), 1, 8, EPS)
    with pytest.raises(ValueError, match="3 heads of 8 don't fit into 24"):
        conv_silu_norm(x, weight, starts, 3, 8, EPS)


def test_least_work():
    op, (workload, *_) = OPTIMIZATION.op, OPTIMIZATION.op.workloads
    T, C, keys = 5376, 6144, 4096
    assert op.bytes_moved(workload) == 2 * (5 * T * C + 2 * 4 * C) + 2 * 4 * T * 32 + 2 * 4 * 13
    assert op.flops(workload) == T * (36 * C + 9 * keys)
    trained = op.workloads[1]
    assert op.bytes_moved(trained) - op.bytes_moved(workload) == 2 * 4 * C
    assert op.flops(trained) - op.flops(workload) == 8 * T * C


def built(method: str = "full", checkpointing: bool = False, model: str = "qwen3.5-tiny") -> tuple[Run, object]:
    where = {"device": DEVICE.type, "dtype": "float32", "gradient_checkpointing": checkpointing}
    settings = {"repeatable_attention": True, "lora": LoraConfig(rank=4, alpha=8.0), "data": DataConfig(pack_length=96)}
    run, dataset = build(Config(model=model, method=method, **where, **settings))
    return run, dataset.micro_batches(0, 1, 1)[0].to(run.device)


@pytest.mark.parametrize(("method", "checkpointing"), [("full", False), ("lora", True)], ids=["full", "lora"])
def test_qwen35_trains_as_before(method, checkpointing):
    run, batch = built(method, checkpointing)
    names, before = mixing_layers(run.model), dict(run.model.named_parameters())
    assert names == [f"model.layers.{index}.linear_attn" for index in range(3)] and len(batch.lengths) > 1
    state, stock = list(run.model.state_dict()), step(run, batch)
    assert eligible(run) is None
    apply(run)
    layers = [run.model.get_submodule(name) for name in names]
    assert all(type(layer) is PackedDeltaNet and isinstance(layer.conv1d, ConvSiluNorm) for layer in layers)
    assert all(layer.qk_normalized and layer.conv1d.training for layer in layers)
    after = dict(run.model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert list(run.model.state_dict()) == state
    changed = step(run, batch)
    assert changed.keys() == stock.keys() and len(stock) > 10
    error, where = worst_error(changed, stock)  # pools a layer's four decay rates, which alone are ill-conditioned
    assert 0 < error <= 1e-4, where
    assert "has no gated-delta layers" in eligible(run)
    with pytest.raises(ValueError, match="to change"):
        apply(run)


class OtherRule(PackedDeltaNet):
    """Stands for a faster delta rule, as ssm_fast_path's: a subclass with a convolution and a rule of its own."""

    def convolve(self, x, pack):
        raise AssertionError("the mixer stands in for the convolution")

    def delta_rule(self, q, k, v, g, beta, pack):
        self.seen = self.qk_normalized, q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
        return super().delta_rule(q, k, v, g, beta, pack)


@pytest.mark.parametrize("first", ["conv_silu_norm", "the other rule"])
def test_another_delta_rule_takes_it_in_either_order(first):
    run, batch = built()
    stock = step(run, batch)
    if first == "conv_silu_norm":
        apply(run)
    layers = [module for module in run.model.modules() if type(module) is PackedDeltaNet]
    for layer in layers:
        layer.__class__ = OtherRule
    if first != "conv_silu_norm":
        apply(run)
    assert len(layers) == 3
    error, where = worst_error(step(run, batch), stock)
    assert error <= 1e-4, where
    assert all(layer.seen == (True, True) for layer in layers)


def test_rows_without_a_pack_are_documents():
    run, _ = built()
    layer = next(module for module in run.model.modules() if type(module) is PackedDeltaNet)
    x = drawn(3, 20, 128)
    with torch.no_grad():
        stock = layer(x)
        apply(run)
        torch.testing.assert_close(layer(x), stock, rtol=1e-4, atol=1e-5)


def test_a_model_without_a_delta_rule_is_told_why():
    run, _ = built(model="qwen3-tiny")
    assert eligible(run) == "Qwen3ForCausalLM has no gated-delta layers with a convolution"


def test_reasons_are_in_words(monkeypatch):
    run, _ = built()
    layer = run.model.model.layers[1].linear_attn
    name = "model.layers.1.linear_attn.conv1d"
    asked = SimpleNamespace(model=run.model, device=run.device, dtype=torch.bfloat16)
    assert "conv1d.weight is torch.float32, but the run computes in torch.bfloat16" in eligible(asked)
    asked.dtype = torch.float64
    assert "the kernel takes torch.bfloat16" in eligible(asked)
    layer.activation = "gelu"
    assert eligible(run) == f"{name} is followed by gelu, not SiLU"
    layer.activation, conv = "silu", layer.conv1d
    C = conv.weight.shape[0]
    layer.conv1d = nn.Conv1d(C, C, 4, groups=C, padding=3)
    assert eligible(run) == f"{name} has a bias"
    layer.conv1d = nn.Conv1d(C, C, 3, groups=C, bias=False)
    assert eligible(run) == f"{name} has a weight of shape [{C}, 1, 3]; [{C}, 1, 4] with step 1 is expected"
    layer.conv1d = conv
    assert eligible(run) is None
    handle = conv.register_forward_hook(lambda module, arguments, output: output)
    assert "carries hooks" in eligible(run)
    handle.remove()
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    assert "TRITON_INTERPRET=1" in eligible(SimpleNamespace(model=run.model, device=torch.device("cpu")))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.mem_get_info()[1] < 64 << 30, reason="needs a GPU with 64 GiB of memory"
)
def test_offsets_beyond_2_to_the_31():
    T, C = (1 << 19) + 64, 6144
    x = torch.randn(64, C, device="cuda").bfloat16().repeat(T // 64, 1).requires_grad_()
    weight, starts = torch.full((C, 4), 0.3, device="cuda").bfloat16(), torch.arange(T, device="cuda").int() // 64 * 64
    outputs = conv_silu_norm(x, weight, starts, 16, 128, EPS)
    dx = torch.autograd.grad(outputs, x, [torch.ones_like(output) for output in outputs])[0]
    for value in (*outputs, dx):
        assert torch.equal(value[-64:], value[:64])
