"""kept_delta_states: what it hands from FLA's forward to its backward. FLA needs a GPU; its pieces are stand-ins here."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch
from fla_pieces import CALLS, PACK, inputs, loaded
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench.plan import combination
from kernels import registry
from kernels.kept_delta_states import OPTIMIZATION, patch
from kernels.ssm_fast_path import OPTIMIZATION as SSM_FAST_PATH
from loop.config import Config
from loop.delta_net import PackedDeltaNet

MODULES = ("kernels.ssm_fast_path.kernel", "kernels.kept_delta_states.kernel")


@pytest.fixture
def kernel(monkeypatch) -> Iterator[ModuleType]:
    with loaded(monkeypatch, *MODULES) as module:
        yield module


@pytest.mark.parametrize("normalized", [True, False])
def test_backward_is_given_what_forward_made_and_makes_nothing_again(kernel, normalized):
    tensors = inputs()
    out = kernel.kept_delta_rule(*tensors, PACK, normalized)
    assert out.shape == tensors[2].shape and out.dtype == torch.bfloat16
    forward = [name for name, _ in CALLS]
    norms = [] if normalized else ["l2norm_fwd"] * 2
    assert forward == [
        *norms, "chunk_local_cumsum", "chunk_gated_delta_rule_fwd_intra", "chunk_gated_delta_rule_fwd_h", "chunk_fwd_o",
    ]  # fmt: skip
    made = {name: given for name, given in CALLS}
    w, h, values = (made[name][key] for name, key in (
        ("chunk_gated_delta_rule_fwd_h", "w"), ("chunk_fwd_o", "h"), ("chunk_fwd_o", "v"),
    ))  # fmt: skip
    CALLS.clear()
    out.sum().backward()
    backward = dict(CALLS)
    norms = [] if normalized else ["l2norm_bwd"] * 2
    assert [name for name, _ in CALLS] == [
        "chunk_bwd_dv_local", "chunk_gated_delta_rule_bwd_dhu", "chunk_bwd_dqkwg", "prepare_wy_repr_bwd",
        "chunk_local_cumsum", *norms,
    ]  # fmt: skip
    dqkwg = backward["chunk_bwd_dqkwg"]
    assert all(torch.equal(dqkwg[key], value) for key, value in (("w", w), ("h", h), ("v", values)))
    assert torch.equal(backward["chunk_gated_delta_rule_bwd_dhu"]["w"], w)
    assert all(given["cu_seqlens"] is PACK.cu_seqlens for name, given in CALLS if not name.startswith("l2norm"))
    assert [x.grad.dtype for x in tensors] == [x.dtype for x in tensors]
    assert [x.grad.shape for x in tensors] == [x.shape for x in tensors]


@pytest.mark.parametrize("normalized", [True, False])
def test_it_can_be_checkpointed(kernel, normalized):
    """What it saved may be unpacked once then."""
    tensors = inputs()
    out = checkpoint(kernel.kept_delta_rule, *tensors, PACK, normalized, use_reentrant=False)
    gradients = torch.autograd.grad(out.sum(), tensors)
    assert [(x.shape, x.dtype) for x in gradients] == [(x.shape, x.dtype) for x in tensors]


def test_a_second_backward_is_given_the_same(kernel):
    out = kernel.kept_delta_rule(*inputs(), PACK, True)
    CALLS.clear()
    out.sum().backward(retain_graph=True)
    first = [(name, {key: x.clone() for key, x in given.items() if isinstance(x, Tensor)}) for name, given in CALLS[:2]]
    CALLS.clear()
    out.sum().backward()
    for (name, given), (again, other) in zip(first, CALLS, strict=False):
        assert name == again and all(torch.equal(x, other[key]) for key, x in given.items() if key != "dv")


def test_layers_are_swapped(kernel):
    model = nn.Sequential(PackedDeltaNet(nn.Linear(2, 2)), nn.Linear(2, 2))
    patch.apply(SimpleNamespace(model=model))
    assert type(model[0]) is kernel.KeptDeltaNet and type(model[1]) is nn.Linear


def test_it_says_what_it_lacks(monkeypatch):
    layers = SimpleNamespace(model=nn.Sequential(PackedDeltaNet(nn.Linear(2, 2))))
    assert (
        patch.eligible(SimpleNamespace(model=nn.Linear(2, 2))) == "the model has no gated-delta layers on the PyTorch path"
    )
    for answer in (lambda name: None, lambda name: importlib.import_module("no_such_package_at_all")):
        monkeypatch.setattr(importlib.util, "find_spec", answer)
        assert patch.eligible(layers) == f"needs flash-linear-attention 0.6: there is no {patch.PARTS}"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert patch.eligible(layers) is None


def test_it_takes_the_place_of_ssm_fast_path():
    assert (
        OPTIMIZATION.op.reference is SSM_FAST_PATH.op.reference
        and OPTIMIZATION.op.candidate is not SSM_FAST_PATH.op.candidate
    )
    assert OPTIMIZATION.op.workloads == SSM_FAST_PATH.op.workloads
    for ratios, stays in (((2.1, 2.0), "kept_delta_states"), ((2.0, 2.1), "ssm_fast_path")):
        kept, plain = ratios
        together = combination({"kept_delta_states": kept, "silu_mul": 1.1, "ssm_fast_path": plain}, Config())
        assert set(together.optimizations) == {stays, "silu_mul"}
    assert registry.discover()["kept_delta_states"] is OPTIMIZATION
