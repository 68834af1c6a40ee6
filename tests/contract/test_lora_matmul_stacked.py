"""lora_matmul where base weights lie one below another: one product, the same function, and nothing to keep in step."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_lora_matmul import EPS, as_fp64, gradients, normal, run_of, step_of, written_out
from torch import Tensor, nn

from kernels.lora_matmul import kernel
from kernels.lora_matmul.kernel import FusedLora, SharedInput, SharingLinear, joined_in_place, lora_matmul
from kernels.lora_matmul.patch import apply
from kernels.silu_mul.patch import FusedMLP
from kernels.silu_mul.patch import apply as fuse_mlps

IN, OUTS, RANK, SCALINGS = 24, (16, 40, 8), 4, (2.0, 0.3, 1.7)
BF16 = torch.bfloat16


# What lies behind what


@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=4), other=st.integers(1, 7), dim=st.integers(0, 1))
def test_parts_of_one_tensor_are_seen_as_what_cat_would_copy(sizes, other, dim):
    whole = torch.arange(float(sum(sizes) * other)).view((sum(sizes), other) if dim == 0 else (other, sum(sizes)))
    joined = joined_in_place(whole.split(sizes, dim), dim)
    assert torch.equal(joined, whole) and joined.data_ptr() == whole.data_ptr()
    assert joined_in_place([part.clone() for part in whole.split(sizes, dim)], dim) is None


@pytest.mark.parametrize("dim", [0, 1])
def test_a_part_out_of_a_wider_tensor_is_enough(dim):
    whole = torch.randn(12, 20)[2:10, 3:17]
    assert torch.equal(joined_in_place(whole.split(2, dim), dim), whole)


@pytest.mark.parametrize(
    "parts",
    [
        lambda w: [w[:4]],
        lambda w: [w[4:], w[:4]],
        lambda w: [w[:4], w[5:]],
        lambda w: [w[:4], w[3:]],
        lambda w: [w[:4], w[4:].clone()],
        lambda w: [w[:4], w[4:, :5]],
        lambda w: [w[:4], w[4:].t().contiguous().t()],
        lambda w: [],
    ],
)  # fmt: skip
def test_nothing_else_is_joined(parts):
    assert joined_in_place(parts(torch.randn(8, 6)), 0) is None


def test_rows_that_follow_each_other_do_not_lie_side_by_side():
    """Two matrices in one storage, the second where the first one's second row begins."""
    storage = torch.randn(24)
    one, other = storage.as_strided((3, 4), (4, 1)), storage.as_strided((3, 4), (4, 1), 4)
    assert joined_in_place([one, other], 1) is None


# The node


def tensors(dtype: torch.dtype) -> dict[str, list]:
    together = normal(sum(OUTS), IN, seed=5).to(dtype)
    return {
        "weights": list(together.split(OUTS)),
        "biases": [None] * len(OUTS),
        "a": [normal(RANK, IN, seed=100 + out).to(dtype).requires_grad_() for out in OUTS],
        "b": [normal(out, RANK, seed=out).to(dtype).requires_grad_() for out in OUTS],
    }


@pytest.fixture
def products(monkeypatch) -> list[tuple[int, int]]:
    """How many products dx was made of, node by node, and the length of the first one's rows."""
    counted: list[tuple[int, int]] = []

    def counting(dys, weights):
        found = original(dys, weights)
        counted.append((len(found), found[0][0].shape[1]))
        return found

    original = kernel._products
    monkeypatch.setattr(kernel, "_products", counting)
    return counted


@pytest.mark.parametrize("side_by_side", [True, False])
@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_outputs_and_every_gradient_beside_fp64(dtype, side_by_side, products):
    held, x = tensors(dtype), normal(3, 7, IN, seed=1).to(dtype).requires_grad_()
    incoming = list(normal(3, 7, sum(OUTS), seed=9).to(dtype).split(OUTS, dim=-1))
    if not side_by_side:
        incoming = [dy.clone() for dy in incoming]
    ours, leaves = lora_matmul(x, *held.values(), SCALINGS), [x, *held["a"], *held["b"]]
    assert len({y.untyped_storage().data_ptr() for y in ours}) == 1 and all(y.stride(-1) == 1 for y in ours)
    exact_x, exact = as_fp64(x), {name: as_fp64(value) for name, value in held.items()}
    truth = written_out(exact_x, None, exact)
    found = torch.autograd.grad(ours, leaves, incoming)
    wanted = gradients(truth, [exact_x, *exact["a"], *exact["b"]], incoming)
    for mine, want in zip((*ours, *found), (*truth, *wanted), strict=True):
        assert (mine.double() - want).norm() <= 6 * EPS[dtype] * want.norm()
    assert products == [(1, sum(OUTS)) if side_by_side else (len(OUTS), OUTS[0])]


def test_where_one_output_is_not_used_the_others_gradients_are_right():
    held, x = tensors(torch.float32), normal(5, IN, seed=1).float().requires_grad_()
    incoming = normal(5, sum(OUTS), seed=9).float().split(OUTS, dim=1)
    used = [incoming[0], None, incoming[2]]
    (mine,) = gradients(lora_matmul(x, *held.values(), SCALINGS), [x], used)
    exact_x = as_fp64(x)
    (want,) = gradients(written_out(exact_x, None, {name: as_fp64(value) for name, value in held.items()}), [exact_x], used)
    assert (mine.double() - want).norm() <= 6 * EPS[torch.float32] * want.norm()


# Who is stacked


def members(dtype: torch.dtype, bias: bool = False) -> list[FusedLora]:
    bases = [nn.Linear(IN, out, bias=bias, dtype=dtype).requires_grad_(False) for out in OUTS]
    a, b = ([nn.Parameter(torch.randn(*size, dtype=dtype)) for size in sizes]
            for sizes in ([(RANK, IN)] * len(OUTS), [(out, RANK) for out in OUTS]))  # fmt: skip
    return [FusedLora(*part, 2.0, 0.0) for part in zip(bases, a, b, strict=True)]


def weights_of(made: list[FusedLora]) -> list[Tensor]:
    return [member.base_layer.weight for member in made]


def test_the_parameters_stay_the_same_objects_with_the_same_values():
    made = members(BF16)
    before, values = weights_of(made), [weight.detach().clone() for weight in weights_of(made)]
    SharedInput(made).stack()
    for weight, old, value in zip(weights_of(made), before, values, strict=True):
        assert weight is old and torch.equal(weight, value) and isinstance(weight, nn.Parameter) and not weight.requires_grad
    assert joined_in_place(weights_of(made), 0).shape == (sum(OUTS), IN)


@pytest.mark.parametrize(
    "made", [lambda: members(torch.float32), lambda: members(BF16, bias=True), lambda: members(BF16)[:1]]
)
def test_fp32_biases_and_one_alone_are_left_where_they_are(made):
    made = made()
    places = [weight.data_ptr() for weight in weights_of(made)]
    SharedInput([*made, SharingLinear(nn.Linear(IN, 4, bias=False, dtype=made[0].base_layer.weight.dtype))]).stack()
    assert [weight.data_ptr() for weight in weights_of(made)] == places


def test_weights_that_are_exchanged_loaded_or_copied_are_followed():
    made, x = members(BF16), torch.randn(6, IN, dtype=BF16)
    SharedInput(made).stack()
    made[1].base_layer.weight.data = torch.randn(OUTS[1], IN, dtype=BF16)  # somebody else's storage
    copied = copy.deepcopy(nn.ModuleList(made))
    with torch.no_grad():
        made[2].base_layer.weight.copy_(torch.randn(OUTS[2], IN))
    for one in (*made, *copied):
        torch.testing.assert_close(one(x), one.alone(x))
    assert not torch.equal(made[2](x), copied[2](x))


def test_in_a_model_what_goes_to_rows_at_any_distance_is_stacked_and_the_mlp_s_dx_is_one_product(products):
    run = run_of("qwen3.5-tiny", "bfloat16", checkpointing=False, dropout=0.0)
    apply(run)
    fuse_mlps(run)
    stacked, apart = set(), set()
    for module in run.model.modules():
        for names in (("gate_proj", "up_proj"), ("in_proj_qkv", "in_proj_z"), ("q_proj", "k_proj", "v_proj")):
            if all(isinstance(getattr(module, name, None), FusedLora) for name in names):
                weights = [getattr(module, name).base_layer.weight for name in names]
                (apart if joined_in_place(weights, 0) is None else stacked).add(names[0])
    assert stacked == {"gate_proj", "in_proj_qkv"} and apart == {"q_proj"}
    step_of(run)
    mlps = sum(isinstance(module, FusedMLP) for module in run.model.modules())
    assert products.count((1, 2 * run.model.config.intermediate_size)) == 2 * mlps
