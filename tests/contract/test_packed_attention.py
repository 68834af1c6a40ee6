"""packed_attention: a document is what it is alone, nothing passes between documents, and gradients are right."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from kernels.contract import Workload
from kernels.packed_attention import OPTIMIZATION
from kernels.packed_attention.kernel import NAME, attend_within_documents
from kernels.packed_attention.op import pack_of
from kernels.packed_attention.patch import apply, eligible
from kernels.packed_attention.reference import document_mask, layer_of, masked_attention
from loop.batch import PackedBatch
from loop.config import Config
from loop.model import forward_body, load_model

CPU = torch.device("cpu")
HEADS, KV, WIDTH = 4, 2, 16
LAYOUTS = ((1, 2, 3, 1), (64, 64), (5, 64, 130, 1, 70), (211,))
WINDOWS = (None, 1, 20, 500)


def draw(length: int, seed: int = 0, kv: int = KV) -> list[torch.Tensor]:
    """query, key and value [1, heads, length, WIDTH]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, length, WIDTH, generator=generator) for heads in (HEADS, kv, kv)]


def within_documents(q, k, v, lengths, window=None):
    pack = pack_of(lengths, CPU)
    return attend_within_documents(layer_of(q, k), q, k, v, None, pack=pack, sliding_window=window)[0]


def alone(q, k, v, window=None):
    """Attention of one document by its definition, in fp64: [1, L, heads, D]."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    t = torch.arange(q.shape[2])
    hidden = (t[:, None] < t) | (t[:, None] - t >= (window or len(t)))
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(hidden, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def spans(lengths):
    ends = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    return [slice(start, end) for start, end in pairwise(ends)]


def gradients(function, tensors, incoming):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, incoming.to(y.dtype))]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", LAYOUTS, ids=str)
def test_each_document_is_itself_alone(lengths, window):
    q, k, v = draw(sum(lengths))
    incoming = torch.randn(1, sum(lengths), HEADS, WIDTH, generator=torch.Generator().manual_seed(9))
    packed = gradients(lambda *x: within_documents(*x, lengths, window), (q, k, v), incoming)
    for span in spans(lengths):
        parts = [x[:, :, span].double() for x in (q, k, v)]
        truth = gradients(lambda *x: alone(*x, window), parts, incoming[:, span])
        assert_close(packed[0][:, span], truth[0])
        for mine, theirs in zip(packed[1:], truth[1:], strict=True):
            assert_close(mine[:, :, span], theirs)


def assert_close(mine, truth):
    torch.testing.assert_close(mine.double(), truth, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("edited", range(5))
def test_an_edit_of_one_document_leaves_the_others_bitwise_unchanged(edited, window):
    lengths = LAYOUTS[2]
    tensors, others = draw(sum(lengths)), draw(sum(lengths), seed=1)
    incoming = torch.randn(1, sum(lengths), HEADS, WIDTH, generator=torch.Generator().manual_seed(9))
    span = spans(lengths)[edited]
    changed = [x.clone() for x in tensors]
    for x, other in zip(changed, others, strict=True):
        x[:, :, span] = 100 * other[:, :, span]
    before, after = (gradients(lambda *x: within_documents(*x, lengths, window), t, incoming) for t in (tensors, changed))
    elsewhere = torch.ones(sum(lengths), dtype=torch.bool)
    elsewhere[span] = False
    assert torch.equal(before[0][:, elsewhere], after[0][:, elsewhere])
    assert not torch.equal(before[0][:, span], after[0][:, span])
    for one, other in zip(before[1:], after[1:], strict=True):
        assert torch.equal(one[:, :, elsewhere], other[:, :, elsewhere])


def test_the_order_of_documents_does_not_matter():
    lengths = LAYOUTS[2]
    tensors = draw(sum(lengths))
    forward = within_documents(*tensors, lengths)
    reverse = [torch.cat([x[:, :, span] for span in reversed(spans(lengths))], dim=2) for x in tensors]
    back = within_documents(*reverse, lengths[::-1])
    again = torch.cat([back[:, span] for span in reversed(spans(lengths[::-1]))], dim=1)
    torch.testing.assert_close(again, forward, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", LAYOUTS, ids=str)
def test_the_reference_s_mask_is_the_same_function(lengths, window):
    q, k, v = (x.double() for x in draw(sum(lengths)))
    truth = torch.cat([alone(*(x[:, :, span] for x in (q, k, v)), window) for span in spans(lengths)], dim=1)
    torch.testing.assert_close(masked_attention(q, k, v, pack_of(lengths, CPU), window), truth)


def test_the_mask_by_hand():
    mask = document_mask(pack_of((2, 3), CPU), 1, 5, window=2)[0, 0].int().tolist()
    assert mask == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    rows = document_mask(pack_of((1, 1, 2), CPU), 2, 2)[:, 0].int().tolist()
    assert rows == [[[1, 0], [0, 1]], [[1, 0], [1, 1]]]


def test_no_mask_where_plain_causality_is_all(monkeypatch):
    seen = []

    def record(query, key, value, attn_mask=None, is_causal=False, **options):
        seen.append((query.shape[2], None if attn_mask is None else tuple(attn_mask.shape), is_causal))
        return query

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    within_documents(*draw(206), (64, 130, 12))
    within_documents(*draw(206), (64, 130, 12), window=100)
    assert seen == [(64, None, True), (192, None, True), (64, None, True), (192, (1, 1, 192, 192), False)]


def test_refuses_to_guess_boundaries():
    q, k, v = draw(8)
    with pytest.raises(ValueError, match="boundaries"):
        attend_within_documents(layer_of(q, k), q, k, v, None)


@pytest.mark.parametrize("name", ["qwen3-tiny", "mistral-tiny"])
def test_a_model_computes_the_same(name):
    """Mistral's sliding window is 96, so the first document is longer and the rest are not."""
    lengths = (130, 20, 1, 49)
    model = load_model(Config(model=name, device="cpu"), 64)
    run = SimpleNamespace(model=model)
    ids = torch.randint(64, (1, 200), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    batch = PackedBatch(ids, ids, positions, pack_of(lengths, CPU).cu_seqlens, 200, 200)
    with torch.no_grad():
        before = forward_body(model, batch)
        assert eligible(run) is None
        apply(run)
        after = forward_body(model, batch)
    assert model.config._attn_implementation == NAME
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert not torch.equal(after, before)  # the other function did run
    assert eligible(run).startswith(f"attention is {NAME}; only ")


def test_least_work_by_hand():
    shape = {"B": 1, "L": 7, "H": 2, "KV": 1, "D": 16}
    name = next(w.name for w in OPTIMIZATION.op.workloads if w.name == "small, one long")
    long = Workload(name, shape | {"L": 211})
    assert OPTIMIZATION.op.flops(long) == 7 * 2 * (211 * 212 // 2) * 2 * 16
    assert OPTIMIZATION.op.flops(Workload(name, long.shape | {"W": 1})) == 7 * 2 * 211 * 2 * 16
    assert OPTIMIZATION.op.bytes_moved(long) == 211 * 16 * (5 * 2 + 6 * 1) * 2
