"""lora_matmul: the node against fp64, who shares what and when, and the swap on a model beside PEFT."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abtest.opcheck import check_op
from kernels.contract import Workload
from kernels.lora_matmul import OPTIMIZATION
from kernels.lora_matmul.kernel import FusedLora, SharedInput, SharingLinear, lora_matmul
from kernels.lora_matmul.op import fused
from kernels.lora_matmul.patch import apply, eligible
from kernels.lora_matmul.reference import peft_layers
from kernels.registry import select
from loop import lora
from loop.batch import IGNORE, PackedBatch
from loop.config import Config, LoraConfig, OptimConfig
from loop.errors import UserError
from loop.lora import ADAPTER_CONFIG, ADAPTER_FILE, adapters, save_adapters
from loop.model import cross_entropy_head, load_model, plain_micro_step, trainable
from loop.optim import MasterAdamW
from loop.run import Run
from loop.training import accumulate

CPU = torch.device("cpu")
VOCABULARY = 128
IN, OUTS, RANKS, SCALINGS = 13, (7, 22, 5), (3, 1, 6), (2.0, 0.3, 1.7)
NARROW = (4, 1)  # outputs of frozen projections without adapters
COUNT = len(OUTS)
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}


def normal(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensors(dtype: torch.dtype, biased: bool = True) -> dict[str, list[Tensor]]:
    """Frozen weights and biases, and trained a and b, of three projections with ranks of their own."""
    return {
        "weights": [normal(out, IN, seed=out).to(dtype) for out in OUTS],
        "biases": [normal(out, seed=50 + out).to(dtype) if biased else None for out in OUTS],
        "a": [normal(rank, IN, seed=100 + rank).to(dtype).requires_grad_() for rank in RANKS],
        "b": [normal(out, rank, seed=out).to(dtype).requires_grad_() for out, rank in zip(OUTS, RANKS, strict=True)],
    }


def written_out(x: Tensor, adapted: Tensor | None, held: dict[str, list]) -> list[Tensor]:
    parts = zip(*held.values(), SCALINGS, strict=True)
    seen = x if adapted is None else adapted
    return [x @ w.t() + (0 if bias is None else bias) + s * (seen @ a.t() @ b.t()) for w, bias, a, b, s in parts]


def gradients(outputs, leaves: list[Tensor], incoming: list[Tensor]) -> list[Tensor | None]:
    pairs = [(y, dy.to(y)) for y, dy in zip(outputs, incoming, strict=True) if dy is not None]
    return torch.autograd.grad([y for y, _ in pairs], leaves, [dy for _, dy in pairs], allow_unused=True)


def as_fp64(item):
    if isinstance(item, list):
        return [as_fp64(one) for one in item]
    return None if item is None else item.detach().double().requires_grad_(item.requires_grad)


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dropped", [False, True], ids=["shared input", "an input of the adapters' own"])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_outputs_and_every_gradient_beside_fp64(dtype, biased, dropped, strided):
    held = tensors(dtype, biased)
    x = normal(IN, 4, 9, seed=1).to(dtype).permute(1, 2, 0) if strided else normal(4, 9, IN, seed=1).to(dtype)
    x, adapted = x.requires_grad_(), (normal(4, 9, IN, seed=2).to(dtype).requires_grad_() if dropped else None)
    assert x.is_contiguous() is not strided
    incoming = [normal(out, 4, 9, seed=70 + out).to(dtype).permute(1, 2, 0) for out in OUTS]
    leaves = [x, *([adapted] if dropped else []), *held["a"], *held["b"]]
    ours = lora_matmul(x, *held.values(), SCALINGS, adapted)
    exact_x, exact_adapted, exact = as_fp64(x), as_fp64(adapted), {name: as_fp64(value) for name, value in held.items()}
    truth = written_out(exact_x, exact_adapted, exact)
    exact_leaves = [exact_x, *([exact_adapted] if dropped else []), *exact["a"], *exact["b"]]
    found, wanted = gradients(ours, leaves, incoming), gradients(truth, exact_leaves, incoming)
    for mine, want in zip((*ours, *found), (*truth, *wanted), strict=True):
        assert mine.dtype == dtype and mine.shape == want.shape
        assert (mine.double() - want).norm() <= 6 * EPS[dtype] * want.norm()
    assert all(y.is_contiguous() for y in ours)
    weights = [item for item in (*held["weights"], *held["biases"]) if item is not None]
    assert not any(weight.requires_grad or weight.grad is not None for weight in weights)


@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_only_what_is_asked_for_gets_a_gradient(dtype):
    held = tensors(dtype)
    x = normal(6, IN, seed=1).to(dtype).requires_grad_()
    exact_x, exact = as_fp64(x), {name: as_fp64(value) for name, value in held.items()}
    incoming = [normal(6, OUTS[0], seed=3), None, normal(6, OUTS[2], seed=4)]  # nobody uses the second output
    leaves, exact_leaves = ([value, *own["a"], *own["b"]] for value, own in ((x, held), (exact_x, exact)))
    rounded = [dy if dy is None else dy.to(dtype) for dy in incoming]
    found = gradients(lora_matmul(x, *held.values(), SCALINGS), leaves, rounded)
    wanted = gradients(written_out(exact_x, None, exact), exact_leaves, rounded)
    for index, (mine, want) in enumerate(zip(found, wanted, strict=True)):
        assert (mine is None) is (want is None) is (index in (2, 5))
        assert mine is None or (mine.double() - want).norm() <= 6 * EPS[dtype] * want.norm()
    frozen = {name: [item.detach() if name == "a" else item for item in value] for name, value in held.items()}
    outputs = lora_matmul(x.detach(), *frozen.values(), SCALINGS)  # the first layer's input needs none
    for mine, whole in zip(gradients(outputs, frozen["b"], rounded), found[1 + COUNT :], strict=True):
        assert (mine is None and whole is None) or torch.equal(mine, whole)


def plain_weights(dtype: torch.dtype) -> list[Tensor]:
    return [normal(out, IN, seed=30 + out).to(dtype) for out in NARROW]


UNUSED = {"all used": (), "a narrow one unused": (COUNT,), "no adapter used": (0, 1, 2), "no narrow one used": (COUNT, 4)}


@pytest.mark.parametrize("unused", UNUSED.values(), ids=UNUSED)
@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_narrow_projections_beside_fp64(dtype, unused):
    held, plain = tensors(dtype), plain_weights(dtype)
    x = normal(IN, 4, 9, seed=1).to(dtype).permute(1, 2, 0).requires_grad_()
    incoming = [
        None if index in unused else normal(out, 4, 9, seed=70 + out).to(dtype).permute(1, 2, 0)
        for index, out in enumerate((*OUTS, *NARROW))
    ]
    ours = lora_matmul(x, *held.values(), SCALINGS, plain=plain)
    exact_x, exact = as_fp64(x), {name: as_fp64(value) for name, value in held.items()}
    truth = [*written_out(exact_x, None, exact), *(exact_x @ weight.double().t() for weight in plain)]
    found = gradients(ours, [x, *held["a"], *held["b"]], incoming)
    wanted = gradients(truth, [exact_x, *exact["a"], *exact["b"]], incoming)
    for mine, want in zip((*ours, *found), (*truth, *wanted), strict=True):
        assert (mine is None) is (want is None)
        if mine is not None:
            assert mine.dtype == dtype and mine.shape == want.shape
            assert (mine.double() - want).norm() <= 6 * EPS[dtype] * want.norm()
    assert all(y.is_contiguous() for y in ours) and len({node_of(y) for y in ours}) == 1
    x = x.detach()  # the first layer's input needs no gradient
    outputs = lora_matmul(x, *held.values(), SCALINGS, plain=plain)
    for mine, whole in zip(gradients(outputs, [*held["a"], *held["b"]], incoming), found[1:], strict=True):
        assert (mine is None and whole is None) or torch.equal(mine, whole)


def test_narrow_projections_see_what_adapters_see():
    held, x = tensors(torch.float32), torch.ones(2, IN)
    with pytest.raises(ValueError, match="plain projections see x"):
        lora_matmul(x, *held.values(), SCALINGS, x, plain_weights(torch.float32))


def test_no_rows_and_one_row():
    held, plain = tensors(torch.float32), plain_weights(torch.float32)
    for shape in ((0, IN), (2, 0, IN), (IN,)):
        x = torch.ones(shape, requires_grad=True)
        outputs = lora_matmul(x, *held.values(), SCALINGS, plain=plain)
        assert [y.shape for y in outputs] == [(*shape[:-1], out) for out in (*OUTS, *NARROW)]
        sum(y.sum() for y in outputs).backward()
        assert x.grad.shape == shape


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape",
    [
        {"T": 1, "D_in": 33, "R": 1, "O1": 9},
        {"T": 129, "D_in": 40, "R": 16, "O1": 31, "O2": 65},
        {"T": 50, "D_in": 27, "R": 9, "O1": 1, "O2": 12, "O3": 3, "O4": 20},
    ],
    ids=str,
)
def test_the_op_is_as_close_to_the_truth_as_peft(shape, dtype):
    for seed in range(2):
        report = check_op(OPTIMIZATION.op, Workload("case", shape, dtype), CPU, seed)
        assert report.passed, report.verdict.reason


@pytest.mark.parametrize(("size", "low", "high"), [(1e-5, 0.02, 0.4), (1e-4, 0.4, 0.95), (1e-3, 0.99, 1.01)])
def test_as_much_of_a_small_adapter_rounds_away_as_in_peft(size, low, high):
    """Early in a bf16 run that is most of it. Where more arrives, the run is another one, be it nearer to the truth."""
    rows, width = 512, 256
    x, weight, a = (normal(*shape, seed=sum(shape)) for shape in ((rows, width), (width, width), (32, width)))
    x, weight, a = x.bfloat16(), (weight / 16).bfloat16(), (a / 16).bfloat16()
    b = (normal(width, 32, seed=7).sign() * size).bfloat16()
    base, adapter = F.linear(x, weight), 2.0 * F.linear(F.linear(x, a), b)

    def arrived(y: Tensor) -> float:
        return float((y - base.double()).flatten() @ adapter.double().flatten() / adapter.double().square().sum())

    (own,) = lora_matmul(x, [weight], [None], [a], [b], (2.0,))
    peft_share = arrived(base + adapter)
    assert low < peft_share < high
    assert arrived(own) == pytest.approx(peft_share, abs=0.02)


@pytest.mark.parametrize("workload", [w for w in OPTIMIZATION.op.workloads if w.small], ids=lambda w: w.name)
def test_the_small_workloads_pass_in_bf16_too(workload):
    report = check_op(OPTIMIZATION.op, replace(workload, dtype="bfloat16"), CPU)
    assert report.passed, report.verdict.reason


def layers_and_members(dropout: float = 0.0) -> tuple[nn.ModuleList, nn.ModuleList]:
    torch.manual_seed(0)
    bases = [nn.Linear(IN, out) for out in OUTS]
    a, b = [normal(4, IN, seed=out) for out in OUTS], [normal(out, 4, seed=out) for out in OUTS]
    layers = peft_layers(bases, a, b, alpha=6.0, dropout=dropout)
    layers.extend(nn.Linear(IN, out, bias=False).requires_grad_(False) for out in NARROW)
    return layers, fused(layers)


def node_of(y: Tensor) -> object:
    """The autograd node that a view of its output came from."""
    return y.grad_fn.next_functions[0][0]


def test_projections_of_one_tensor_are_one_node_and_nothing_is_kept():
    _, members = layers_and_members()
    shared, x = members[0].shared, torch.randn(2, 5, IN)
    outputs = []
    for member in members:
        outputs.append(member(x))
        assert (shared.input is x) is bool(shared.waiting) is (member is not members[-1])
    assert len({id(node_of(y)) for y in outputs}) == 1
    assert shared.input is None and shared.key is None and not shared.waiting
    alone = FusedLora(members[0].base_layer, members[0].lora_A.weight, members[0].lora_B.weight, 1.5, 0.0)
    torch.testing.assert_close(alone(x), outputs[0])


def test_any_order_and_any_repetition_is_right():
    layers, members = layers_and_members()
    x, other = torch.randn(3, IN), torch.randn(3, IN)
    order = [(2, x), (2, x), (0, x), (1, other), (1, x), (0, other), (0, x), (2, x), (1, x.clone()), (1, x)]
    for index, given in [(3, x), (4, other), *order, (3, x), (3, x), (4, x), (4, x.clone()), (0, x)]:
        torch.testing.assert_close(members[index](given), layers[index](given), msg=f"{index}")


@pytest.mark.parametrize("changed", ["input", "weight", "base", "bias", "narrow", "gradient mode", "training"])
def test_what_changed_between_two_calls_is_computed_anew(changed):
    layers, members = layers_and_members(dropout=0.5)
    layers.eval(), members.eval()
    x = torch.randn(3, IN)
    with torch.set_grad_enabled(changed != "gradient mode"):
        stale = members[0](x)
    with torch.no_grad():
        layer, held = members[1].base_layer, {"input": x, "weight": members[1].lora_B.weight, "narrow": layers[3].weight}
        held |= {"base": layer.weight, "bias": layer.bias}
        if changed in held:
            held[changed].mul_(1.5)
    layers.train(changed == "training"), members.train(changed == "training")
    torch.manual_seed(3)
    mine = members[1](x)
    torch.manual_seed(3)
    torch.testing.assert_close(mine, layers[1](x))
    torch.testing.assert_close(members[3](x), layers[3](x))
    assert mine.requires_grad and stale.requires_grad is (changed != "gradient mode")


def test_inference_mode_and_copies():
    layers, members = layers_and_members()
    with torch.inference_mode():
        x = torch.randn(3, IN)
        for layer, member in zip(layers, members, strict=True):
            torch.testing.assert_close(member(x), layer(x))
    twins, x = copy.deepcopy(members), torch.randn(3, IN)
    assert twins[0].shared is not members[0].shared and twins[0].shared.members == tuple(twins)
    with torch.no_grad():
        twins[0].lora_A.weight.zero_()
    for index in range(len(members)):
        twins[index](x)
        torch.testing.assert_close(members[index](x), layers[index](x))


def test_a_failed_call_leaves_nothing_behind():
    _, members = layers_and_members()
    x = torch.randn(3, IN)
    members[0](x)
    with pytest.raises(RuntimeError):
        members[1](torch.randn(3, IN + 1))
    assert members[0].shared.input is None and not members[0].shared.waiting


def test_dropout_draws_peft_s_masks():
    layers, members = layers_and_members(dropout=0.4)
    found = []
    for side in (layers, members):
        torch.manual_seed(11)
        x = normal(4, 6, IN, seed=1).float().requires_grad_()
        outputs = [layer(x) for layer in side]
        adapted = layers[:COUNT]
        parameters = [p for layer in adapted for p in (layer.lora_A["default"].weight, layer.lora_B["default"].weight)]
        incoming = [normal(4, 6, out, seed=out).float() for out in (*OUTS, *NARROW)]
        found.append([*outputs, *gradients(outputs, [x, *parameters], incoming), torch.get_rng_state()])
    for theirs, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[0][-1], found[1][-1])
    assert not torch.allclose(found[0][0], layers.eval()[0](x)), "nothing was dropped"
    assert members[0].shared.input is None, "a narrow projection had the adapters computed, which nobody takes"


def run_of(model: str, dtype: str, checkpointing: bool, dropout: float) -> Run:
    settings = LoraConfig(rank=4, alpha=6.0, dropout=dropout)
    config = Config(model=model, device="cpu", dtype=dtype, gradient_checkpointing=checkpointing, lora=settings)
    built = load_model(config, VOCABULARY)
    lora.attach(built, config.lora, seed=0)
    with torch.no_grad():
        for index, adapter in enumerate(adapters(built)):  # so that A has a gradient too
            adapter.b.copy_(0.1 * normal(*adapter.b.shape, seed=index))
    optimizer = MasterAdamW(trainable(built), OptimConfig(), 1)
    return Run(config, CPU, getattr(torch, dtype), built, cross_entropy_head, plain_micro_step, optimizer)


def batch_of(*lengths: int) -> PackedBatch:
    ids = torch.randint(VOCABULARY, (1, sum(lengths)), generator=torch.Generator().manual_seed(sum(lengths)))
    ends = torch.tensor((0, *lengths)).cumsum(0)
    labels = ids.roll(-1, dims=1)
    labels[0, ends[1:] - 1] = IGNORE
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return PackedBatch(ids, labels, positions, ends.to(torch.int32), sum(lengths), int((labels != IGNORE).sum()))


def step_of(run: Run) -> tuple[list[float], dict[str, Tensor], Tensor]:
    """Losses and gradients of two micro-steps, and the random state behind them."""
    torch.manual_seed(9)
    batches = [batch_of(20, 3, 18), batch_of(41, 6)]
    losses = accumulate(run, batches, sum(batch.supervised_tokens for batch in batches))
    return losses, run.optimizer.gradients(), torch.get_rng_state()


@pytest.mark.parametrize("checkpointing", [True, False], ids=["recomputed", "kept"])
@pytest.mark.parametrize(
    ("model", "dtype", "dropout"),
    [
        ("qwen3.5-tiny", "float32", 0.0),
        ("qwen3.5-tiny", "float32", 0.2),
        ("qwen3.5-tiny", "bfloat16", 0.0),
        ("qwen2-tiny", "float32", 0.0),
    ],
)
def test_a_model_s_gradients_beside_peft_s(model, dtype, dropout, checkpointing):
    losses, theirs, random = step_of(run_of(model, dtype, checkpointing, dropout))
    run = run_of(model, dtype, checkpointing, dropout)
    before, frozen = trainable(run.model), {id(parameter) for parameter in run.model.parameters()}
    assert OPTIMIZATION.eligible(run) is None
    OPTIMIZATION.apply(run)
    after = trainable(run.model)
    assert list(after) == list(before) and all(after[name] is parameter for name, parameter in before.items())
    assert {id(parameter) for parameter in run.model.parameters()} == frozen
    own, ours, own_random = step_of(run)
    assert torch.equal(random, own_random)
    assert own == pytest.approx(losses, rel=1e-6 if dtype == "float32" else 1e-3)
    for name, want in theirs.items():
        assert want.any(), name
        assert (ours[name] - want).norm() <= (2e-5 if dtype == "float32" else 0.06) * want.norm(), name
    found = {module.shared for module in run.model.modules() if isinstance(module, (FusedLora, SharingLinear))} - {None}
    assert found and not any(shared.waiting or shared.input is not None for shared in found)
    assert eligible(run) == "the run has no PEFT LoRA layers"


def test_who_shares_in_a_model():
    run = run_of("qwen3.5-tiny", "float32", False, 0.0)
    layers = len([module for module in run.model.modules() if hasattr(module, "lora_A")])
    apply(run)
    members = {name: m for name, m in run.model.named_modules() if isinstance(m, (FusedLora, SharingLinear))}
    narrow = sum(isinstance(module, SharingLinear) for module in members.values())
    assert len(members) == layers + narrow and narrow == 2 * 3
    found: dict[SharedInput, list[str]] = {}
    for name, module in members.items():
        if module.shared is not None:
            found.setdefault(module.shared, []).append(name.partition("layers.")[2])
    linear = [[f"{i}.linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a")] for i in range(3)]
    attention = [[f"3.self_attn.{part}_proj" for part in "qkv"]]
    mlps = [[f"{i}.mlp.gate_proj", f"{i}.mlp.up_proj"] for i in range(4)]
    assert sorted(found.values()) == sorted(linear + attention + mlps)
    calls = step_nodes(run)
    assert calls == len(found) + (len(members) - sum(map(len, found.values())))


def step_nodes(run: Run) -> int:
    """How many of the nodes one micro-step's loss hangs on."""
    batch = batch_of(9, 12)
    hidden = run.model.get_decoder()(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    seen, front = set(), [hidden.last_hidden_state.grad_fn]
    while front:
        node = front.pop()
        if node is not None and node not in seen:
            seen.add(node)
            front += [parent for parent, _ in node.next_functions]
    return sum(node.name() == "_LoraMatmulBackward" for node in seen)


def test_the_swap_keeps_peft_s_files_and_the_mode(tmp_path):
    run = run_of("qwen3.5-tiny", "float32", False, 0.0)
    run.model.eval()
    for folder in ("before", "after"):
        (tmp_path / folder).mkdir()
        save_adapters(run.model, run.config.lora, tmp_path / folder, "some/model")
        apply(run)
    for name in (ADAPTER_FILE, ADAPTER_CONFIG):
        one, other = ((tmp_path / folder / name).read_bytes() for folder in ("before", "after"))
        assert one == other and len(one) > 100
    assert not any(module.training for module in run.model.modules() if isinstance(module, FusedLora))
    assert {module.dropout for module in run.model.modules() if isinstance(module, FusedLora)} == {0.0}


LEFT_ALONE = {
    "biased": lambda k: setattr(k, "bias", nn.Parameter(torch.zeros(5), requires_grad=False)),
    "trained": lambda k: k.weight.requires_grad_(),
    "watched": lambda k: k.register_forward_hook(lambda *_: None),
    "its own forward": lambda k: setattr(k, "forward", lambda x: x),
    "another dtype": lambda k: k.to(torch.bfloat16),
    "another input": lambda k: setattr(k, "weight", nn.Parameter(torch.zeros(5, IN + 1), requires_grad=False)),
    "wide": lambda k: setattr(k, "out_features", 129),
}


@pytest.mark.parametrize("change", [None, *LEFT_ALONE])
def test_a_frozen_projection_that_is_more_than_narrow_is_left_alone(change):
    run = adapted_block(target_modules=["q_proj"])
    k = run.model.k_proj = nn.Linear(IN, 5, bias=False).requires_grad_(False)
    if change is not None:
        LEFT_ALONE[change](k)
    apply(run)
    shares = run.model.q_proj.shared is not None
    assert shares is isinstance(run.model.k_proj, SharingLinear) is (change is None)
    assert run.model.k_proj.weight is k.weight and (shares or run.model.k_proj is k)
    assert type(run.model.o_proj) is nn.Linear


def test_frozen_projections_alone_have_nothing_to_share():
    run = adapted_block(target_modules=["o_proj"])
    run.model.q_proj = nn.Linear(IN, 5, bias=False).requires_grad_(False)
    run.model.k_proj = nn.Linear(IN, 5, bias=False).requires_grad_(False)
    apply(run)
    assert type(run.model.q_proj) is type(run.model.k_proj) is nn.Linear


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.o_proj = nn.Linear(IN, 7), nn.Linear(IN, 5), nn.Linear(9, IN)


def adapted_block(**settings) -> SimpleNamespace:
    model = Block()
    targets = settings.pop("target_modules", ["q_proj", "k_proj", "o_proj"])
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, **settings), model)
    return SimpleNamespace(model=model)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "is of the variant Dora"),
        ({"lora_bias": True}, "has a bias in its adapter"),
        ({"bias": "lora_only"}, None),
    ],
    ids=["dora", "adapter bias", "trained base bias"],
)
def test_refuses_what_is_more_than_plain_lora(settings, words):
    run = adapted_block(**settings)
    if words is None:
        run.model.q_proj.base_layer.bias.requires_grad_()
        words = "trains its base"
    reason = eligible(run)
    assert reason.startswith(f"q_proj {words}") and reason.endswith("only plain LoRA on a frozen base is one node")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # PEFT's word on a second adapter, which is the point
def test_refuses_adapters_in_another_state_and_models_without():
    assert eligible(SimpleNamespace(model=Block())) == "the run has no PEFT LoRA layers"
    merged, off, two, narrow = (adapted_block() for _ in range(4))
    merged.model.k_proj.merge()
    assert "k_proj is merged" in eligible(merged)
    off.model.q_proj.enable_adapters(False)
    assert "active" in eligible(off)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), two.model, adapter_name="second")
    two.model.q_proj.set_adapter(["default", "second"])
    assert "'second'" in eligible(two)
    narrow.model.q_proj.lora_A["default"].to(torch.bfloat16)
    assert "bfloat16 and torch.float32" in eligible(narrow)
    base, a = nn.Linear(IN, 3), nn.Parameter(torch.zeros(2, IN, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="bfloat16"):
        FusedLora(base, a, nn.Parameter(torch.zeros(3, 2)), 1.0, 0.0)


def test_static_lora_wants_the_same_layers():
    with pytest.raises(UserError, match="lora_matmul and static_lora can't be on together"):
        select(["lora_matmul", "static_lora"])
