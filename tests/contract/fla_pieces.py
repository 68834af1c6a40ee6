"""Stand-ins for FLA's pieces, which need a GPU: they note what they are given and return what nothing else returns."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from loop.delta_net import Pack

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


@contextlib.contextmanager
def loaded(monkeypatch: pytest.MonkeyPatch, *names: str) -> Iterator[ModuleType]:
    """The last of the modules `names`, and the others, imported anew where FLA's modules are stand-ins."""
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
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(names[-1])
    for name in names:
        sys.modules.pop(name, None)


def inputs() -> list[Tensor]:
    """q, k, v, g and beta of six positions and two heads, four wide; g alone in fp32."""
    shapes = [(1, 6, 2, 4)] * 3 + [(1, 6, 2)] * 2
    dtypes = (*[torch.bfloat16] * 3, torch.float32, torch.bfloat16)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape, dtype in zip(shapes, dtypes, strict=True)]


PACK = Pack(torch.tensor([0, 2, 6], dtype=torch.int32), (2, 4))
