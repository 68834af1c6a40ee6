"""chunk_delta_backward: its kernel beside the recurrence in fp64, and what it is handed of FLA's forward.

The kernel's inputs are made in fp64, chunk by chunk, by the formulas of its module's docstring; the truth is autograd
through the definition, token by token, which knows of no chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import log
from types import ModuleType, SimpleNamespace

import pytest
import torch
from fla_pieces import CALLS, PACK, inputs, loaded
from torch import Tensor, nn

from abtest.oracle import recurrence
from kernels.kept_delta_states import OPTIMIZATION as KEPT
from loop.delta_net import PackedDeltaNet
from negative_results.chunk_delta_backward import OPTIMIZATION, patch
from negative_results.chunk_delta_backward.within import chunk_backward

C = 64
NAMES = ("dq", "dk", "dv", "dg", "dbeta")


@dataclasses.dataclass(frozen=True)
class Problem:
    """Inputs q, k, v, g, beta (fp64, g the log decay) of documents of these lengths, and the output's gradient."""

    lengths: Sequence[int]
    inputs: tuple[Tensor, ...]
    do: Tensor

    @property
    def bounds(self) -> list[int]:
        return [0, *accumulate(self.lengths)]

    @property
    def chunks(self) -> list[tuple[int, int]]:
        return [(document, place) for document, length in enumerate(self.lengths) for place in range(-(-length // C))]


def problem(lengths: Sequence[int], H: int, HV: int, K: int, V: int, seed: int = 0, decay: float = 0.3) -> Problem:
    generator, T = torch.Generator().manual_seed(seed), sum(lengths)

    def normal(*size: int) -> Tensor:
        return torch.randn(1, T, *size, generator=generator, dtype=torch.float64)

    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (normal(H, K), normal(H, K)))
    g, beta = (torch.rand(1, T, HV, generator=generator, dtype=torch.float64) for _ in range(2))
    return Problem(lengths, (q, k, normal(HV, V), -decay * g, beta), normal(HV, V))


def truth(own: Problem) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in own.inputs]
    q, k, v, g, beta = leaves
    copies = v.shape[2] // k.shape[2]
    wide = [q.repeat_interleave(copies, 2), k.repeat_interleave(copies, 2), v, g, beta]
    rows = zip(*(x.split(list(own.lengths), dim=1) for x in wide), strict=True)
    out = torch.cat([_plain(*document) for document in rows], dim=1)
    return list(torch.autograd.grad((out * own.do).sum(), leaves))


def _plain(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The oracle's recurrence normalises q and k, which have length 1 already: taken out, so that gradients are of these."""
    state, out = v.new_zeros(v.shape[2], k.shape[-1], v.shape[-1]), []
    for t in range(v.shape[1]):
        state = state * g[0, t, :, None, None].exp()
        change = beta[0, t, :, None] * (v[0, t] - torch.einsum("hkv,hk->hv", state, k[0, t]))
        state = state + torch.einsum("hk,hv->hkv", k[0, t], change)
        out.append(torch.einsum("hkv,hk->hv", state, q[0, t]))
    return torch.stack(out)[None] / k.shape[-1] ** 0.5


def pieces(own: Problem) -> dict[str, Tensor]:
    """What FLA's forward and the part of backward across chunks hand to the kernel."""
    q, k, v, g, beta = own.inputs
    T, HV, K, V = v.shape[1], v.shape[2], k.shape[-1], v.shape[-1]
    made = {"v_new": torch.zeros_like(v), "du": torch.zeros_like(v), "g": torch.zeros_like(g)}
    made |= {"a": v.new_zeros(1, T, HV, C)} | {name: v.new_zeros(len(own.chunks), HV, K, V) for name in ("h", "dh")}
    for head in range(HV):
        narrow = head // (HV // k.shape[2])
        for document in range(len(own.lengths)):
            _one(
                own, made, document, head, (q[0, :, narrow], k[0, :, narrow], v[0, :, head], g[0, :, head], beta[0, :, head])
            )
    return made


def _one(own: Problem, made: dict[str, Tensor], document: int, head: int, inputs: tuple[Tensor, ...]) -> None:
    """One document and one head: the states as leaves of autograd, so that their gradients are there to read."""
    begin, end = own.bounds[document : document + 2]
    state = inputs[2].new_zeros(inputs[1].shape[-1], inputs[2].shape[-1]).requires_grad_()
    total, states, news, scale = 0.0, [state], [], inputs[1].shape[-1] ** -0.5
    for first in range(begin, end, C):
        own_rows = slice(first, min(first + C, end))
        q, k, v, g, beta = (x[own_rows] for x in inputs)
        g = g.cumsum(0)
        decay = (g[:, None] - g[None, :]).exp()
        inverse = torch.linalg.inv(torch.eye(len(g)).double() + torch.tril((k * beta[:, None]) @ k.T * decay, -1))
        w, u = inverse @ (k * (beta * g.exp())[:, None]), inverse @ (v * beta[:, None])
        new = u - w @ states[-1]
        out = scale * ((q * g.exp()[:, None]) @ states[-1] + torch.tril(q @ k.T * decay) @ new)
        total = total + (out * own.do[0, own_rows, head]).sum()
        states.append(states[-1] * g[-1].exp() + (k * (g[-1] - g).exp()[:, None]).T @ new)
        news.append((own_rows, new))
        made["g"][0, own_rows, head], made["a"][0, own_rows, head, : len(g)] = g / log(2), inverse
    for x in (*states, *(new for _, new in news)):
        x.retain_grad()
    (total + 0 * states[-1].sum()).backward()
    at = own.chunks.index((document, 0))
    for place, (own_rows, new) in enumerate(news):
        made["h"][at + place, head], made["dh"][at + place, head] = states[place].detach(), states[place + 1].grad
        made["v_new"][0, own_rows, head], made["du"][0, own_rows, head] = new.detach(), new.grad


def computed(
    own: Problem, made: dict[str, Tensor], bounds: Sequence[int], chunks: Sequence[tuple[int, int]]
) -> tuple[Tensor, ...]:
    q, k, v, _, beta = own.inputs
    narrow = {name: x.float() for name, x in (made | {"q": q, "k": k, "v": v, "beta": beta, "do": own.do}).items()}
    where = {"bounds": torch.tensor(bounds, dtype=torch.int32), "chunks": torch.tensor(chunks, dtype=torch.int32)}
    return chunk_backward(**narrow, scale=k.shape[-1] ** -0.5, **where)


def off(gradient: Tensor, expected: Tensor) -> float:
    """The distance, of a norm that is at least 1: gradients of g cancel, down to exact zeros."""
    return float((gradient.double() - expected).norm()) / max(float(expected.norm()), 1.0)


@pytest.mark.parametrize(("lengths", "H", "HV", "K", "V"), [
    ((64,), 1, 1, 16, 16),
    ((1,), 1, 1, 16, 16),
    ((70, 5, 64), 2, 2, 16, 16),
    ((33, 130), 1, 2, 32, 16),
    ((65, 1), 2, 2, 16, 32),
])  # fmt: skip
def test_gradients_are_those_of_the_recurrence(lengths, H, HV, K, V):
    own = problem(lengths, H, HV, K, V)
    got = computed(own, pieces(own), own.bounds, own.chunks)
    for name, gradient, expected in zip(NAMES, got, truth(own), strict=True):
        assert gradient.shape == expected.shape and gradient.dtype == torch.float32
        assert off(gradient, expected) < 3e-6, name


def test_steep_decay_overflows_nowhere():
    """2^(g_i - g_j) above the diagonal, and rows behind a document's end, would."""
    own = problem((70, 9), 1, 1, 16, 16, decay=40.0)
    for name, gradient, expected in zip(NAMES, computed(own, pieces(own), own.bounds, own.chunks), truth(own), strict=True):
        assert gradient.isfinite().all(), name
        assert off(gradient, expected) < 3e-6, name


def test_documents_without_tokens_and_chunks_behind_the_end_change_nothing():
    """With which CUDA graphs fill up, whatever lies in the states of those chunks."""
    own = problem((70, 5), 1, 1, 16, 16)
    made = pieces(own)
    plain = computed(own, made, own.bounds, own.chunks)
    nobody = torch.full((2, 1, 16, 16), float("nan"), dtype=torch.float64)
    filled = made | {name: torch.cat([made[name], nobody]) for name in ("h", "dh")}
    again = computed(own, filled, [*own.bounds, 75, 75], [*own.chunks, (3, 0), (3, 1)])
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_the_recurrence_here_is_the_oracles():
    own = problem((40,), 1, 1, 16, 16)
    q, k, v, g, beta = own.inputs
    assert torch.allclose(_plain(*own.inputs), recurrence(q, k, v, g, beta), atol=1e-5)


@pytest.fixture
def kernel(monkeypatch) -> Iterator[ModuleType]:
    folders = ("kernels.ssm_fast_path", "kernels.kept_delta_states", "negative_results.chunk_delta_backward")
    with loaded(monkeypatch, *(f"{folder}.kernel" for folder in folders)) as module:
        yield module


def test_it_is_handed_what_forward_made_and_takes_the_place_of_two_kernels(kernel, monkeypatch):
    given = []

    def within(*arguments):
        given.extend(arguments)
        q, k, v, _, g, beta = arguments[:6]
        return q + 1, k + 2, v + 3, g + 4, beta.float() + 5

    monkeypatch.setattr(kernel, "chunk_backward", within)
    tensors = inputs()
    out = kernel.chunked_delta_rule(*tensors, PACK, True)
    made = dict(CALLS)
    CALLS.clear()
    out.sum().backward()
    assert [name for name, _ in CALLS] == ["chunk_bwd_dv_local", "chunk_gated_delta_rule_bwd_dhu"]
    q, k, v, v_new, g, beta, a, h, do, dh, du, scale, bounds, chunks = given
    assert torch.equal(h, made["chunk_fwd_o"]["h"]) and torch.equal(v_new, made["chunk_fwd_o"]["v"])
    assert torch.equal(g, made["chunk_fwd_o"]["g"]) and torch.equal(a, torch.full_like(a, float(a.flatten()[0])))
    assert (float(dh.flatten()[0]), float(du.flatten()[0])) == (2.0, 2.25), "the second piece's first and third output"
    assert torch.equal(do, torch.ones_like(out)) and scale == 4**-0.5
    assert bounds is PACK.cu_seqlens and torch.equal(chunks, PACK.chunk_indices)
    expected = (q + 1, k + 2, v + 3, g + 4, (beta.float() + 5).bfloat16())
    assert [x.grad.dtype for x in tensors] == [x.dtype for x in tensors]
    assert all(torch.equal(x.grad, y) for x, y in zip(tensors, expected, strict=True))


def test_layers_are_swapped(kernel):
    model = nn.Sequential(PackedDeltaNet(nn.Linear(2, 2)), nn.Linear(2, 2))
    patch.apply(SimpleNamespace(model=model))
    assert type(model[0]) is kernel.ChunkedDeltaNet and type(model[1]) is nn.Linear


@pytest.mark.parametrize(("widths", "reason"), [
    ((128, 64), None), ((96, 128), "heads are 96 wide; the kernel takes (16, 32, 64, 128)"),
    ((256, 8), "heads are 8, 256 wide; the kernel takes (16, 32, 64, 128)"),
])  # fmt: skip
def test_heads_of_other_widths_are_refused(widths, reason, monkeypatch):
    monkeypatch.setattr(patch.kept_delta_states, "eligible", lambda run: None)
    layer = PackedDeltaNet(nn.Linear(2, 2))
    layer.head_k_dim, layer.head_v_dim = widths
    run = SimpleNamespace(model=nn.Sequential(layer))
    assert patch.eligible(run) == reason
    monkeypatch.setattr(patch.kept_delta_states, "eligible", lambda run: "no such layer")
    assert patch.eligible(run) == "no such layer"


def test_it_takes_the_place_of_both_others():
    assert OPTIMIZATION.op.reference is KEPT.op.reference and OPTIMIZATION.op.candidate is not KEPT.op.candidate
    assert set(OPTIMIZATION.conflicts) == {"ssm_fast_path", "kept_delta_states"}
    assert OPTIMIZATION.needs.packages == KEPT.needs.packages and OPTIMIZATION.needs.known_wrong is KEPT.needs.known_wrong
