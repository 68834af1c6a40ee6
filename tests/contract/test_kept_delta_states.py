"""kept_delta_states: what it hands from FLA's forward to its backward. FLA needs a GPU; its pieces are stand-ins here."""

from __future__ import annotations

import contextlib
import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from bench.plan import combination
from kernels import registry
from kernels.kept_delta_states import OPTIMIZATION, patch
from kernels.ssm_fast_path import OPTIMIZATION as SSM_FAST_PATH
from loop.config import Config
from loop.delta_net import Pack, PackedDeltaNet

CALLS: list[tuple[str, dict[str, Tensor]]] = []
# Which of what it is given each output of a piece of FLA is like: an argument's place or name; "" for none.
PIECES: dict[str, dict[str, tuple[int | str, ...]]] = {
    "fla.modules.norm.l2norm": {"l2norm_fwd": (0, 0), "l2norm_bwd": (2,)},
    "fla.modules.causal_conv1d": {"causal_conv1d": ()},
    "fla.ops.common.chunk_delta_h": {
        "chunk_gated_delta_rule_fwd_h": ("k", "u", ""), "chunk_gated_delta_rule_bwd_dhu": ("k", "", "dv"),
    },
    "fla.ops.common.chunk_o": {
        "chunk_fwd_o": ("v",), "chunk_bwd_dv_local": ("do",), "chunk_bwd_dqkwg": ("q", "k", "w", "g"),
    },
    "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": ()},
    "fla.ops.gated_delta_rule.chunk_fwd": {"chunk_gated_delta_rule_fwd_intra": ("k", "v", "g")},
    "fla.ops.gated_delta_rule.wy_fast": {"prepare_wy_repr_bwd": ("k", "v", "beta", "g")},
    "fla.ops.utils": {"chunk_local_cumsum": (0,)},
    "fla.ops.utils.constant": {},
}  # fmt: skip


def stand_in(name: str, outputs: tuple[int | str, ...]):
    """Notes what it is given, and returns values that nothing else returns."""

    def piece(*arguments: Tensor, **named):
        given = dict(enumerate(arguments)) | named
        CALLS.append((name, given))
        made = tuple(torch.full_like(given[at], len(CALLS) + n / 8) if at != "" else None for n, at in enumerate(outputs))
        return made if len(made) > 1 else made[0]

    return piece


@pytest.fixture
def kernel(monkeypatch) -> ModuleType:
    CALLS.clear()
    for module, pieces in PIECES.items():
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if not hasattr(sys.modules.get(name), "stands_in"):
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
                sys.modules[name].stands_in = True
                sys.modules[name].__path__ = []
        for name, outputs in pieces.items():
            monkeypatch.setattr(sys.modules[module], name, stand_in(name, outputs), raising=False)
    monkeypatch.setattr(sys.modules["fla.ops.utils.constant"], "RCP_LN2", 1.25, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for name in ("kernels.ssm_fast_path.kernel", "kernels.kept_delta_states.kernel"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("kernels.kept_delta_states.kernel")
    for name in ("kernels.ssm_fast_path.kernel", "kernels.kept_delta_states.kernel"):
        sys.modules.pop(name, None)


def inputs() -> list[Tensor]:
    """q, k, v, g and beta of six positions and two heads, four wide; g alone in fp32."""
    shapes = [(1, 6, 2, 4)] * 3 + [(1, 6, 2)] * 2
    dtypes = (*[torch.bfloat16] * 3, torch.float32, torch.bfloat16)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape, dtype in zip(shapes, dtypes, strict=True)]


PACK = Pack(torch.tensor([0, 2, 6], dtype=torch.int32), (2, 4))


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
