"""Attention that repeats itself on a GPU: documents as rows are the masked whole, and a mask that shows more is not cut."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from loop import attention
from loop.attention import _part_of, attend, by_documents, shows_only
from loop.delta_net import Pack

HEADS, KV, WIDTH = 4, 2, 16
MODULE = SimpleNamespace(is_causal=True, num_key_value_groups=HEADS // KV, training=True)
LAYOUTS = (((1, 2, 3, 1),), ((64, 64),), ((5, 64, 130, 1),), ((70, 30), (100,)), ((1,), (1,)))


def packed(rows: tuple[tuple[int, ...], ...]) -> tuple[Pack, torch.Tensor]:
    """The boundaries of rows of documents, and transformers' mask of them, [B, 1, L, L]."""
    lengths = tuple(length for row in rows for length in row)
    ends = torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)
    owner = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])
    causal = torch.ones(sum(rows[0]), sum(rows[0]), dtype=torch.bool).tril()
    return Pack(ends, lengths), ((owner[:, :, None] == owner[:, None, :]) & causal)[:, None]


def draw(rows, dtype=torch.float64) -> list[torch.Tensor]:
    """query, key and value [B, heads, L, WIDTH], with gradients."""
    generator = torch.Generator().manual_seed(3)
    size = (len(rows), sum(rows[0]), WIDTH)
    made = (torch.randn(size[0], heads, *size[1:], generator=generator, dtype=torch.float64) for heads in (HEADS, KV, KV))
    return [x.to(dtype).requires_grad_() for x in made]


@pytest.mark.parametrize("rows", LAYOUTS, ids=str)
def test_documents_as_rows_are_the_masked_whole(rows):
    pack, mask = packed(rows)
    parts = [_part_of(mask, positions) for positions in pack.groups]
    assert shows_only(mask, parts)
    one, other = draw(rows), draw(rows)
    whole, _ = sdpa_attention_forward(MODULE, *one, mask)
    split, _ = by_documents(MODULE, *other, parts, pack, sdpa_attention_forward)
    torch.testing.assert_close(split, whole)
    incoming = torch.randn(whole.shape, generator=torch.Generator().manual_seed(4), dtype=whole.dtype)
    for got, wanted in zip(
        torch.autograd.grad(split, other, incoming), torch.autograd.grad(whole, one, incoming), strict=True
    ):
        torch.testing.assert_close(got, wanted)
        assert bool(torch.isfinite(got).all())


@pytest.mark.parametrize("window", [1, 20])
def test_a_sliding_window_stays_in_the_parts(window):
    rows = ((5, 64, 130, 1),)
    pack, mask = packed(rows)
    mask = mask & ~torch.ones_like(mask[0, 0]).tril(-window)
    parts = [_part_of(mask, positions) for positions in pack.groups]
    assert shows_only(mask, parts)
    tensors = draw(rows)
    whole, _ = sdpa_attention_forward(MODULE, *tensors, mask)
    torch.testing.assert_close(by_documents(MODULE, *tensors, parts, pack, sdpa_attention_forward)[0], whole)


@pytest.mark.parametrize(("query", "key"), [(5, 4), (199, 0), (0, 199)])
def test_a_mask_that_shows_one_position_of_another_document_is_seen(query, key):
    pack, mask = packed(((5, 64, 130, 1),))
    mask[0, 0, query, key] = True
    assert not shows_only(mask, [_part_of(mask, positions) for positions in pack.groups])


@pytest.mark.parametrize("leaky", [False, True])
def test_on_a_gpu_the_way_taken_depends_on_what_the_mask_shows(leaky, monkeypatch):
    """A stand-in for CUDA: only which calls are made, and with which masks, is looked at."""
    rows, calls = ((5, 64, 130, 1),), []
    pack, mask = packed(rows)
    if leaky:
        mask[0, 0, 5, 4] = True

    def recorded(module, q, k, v, mask, **options):
        calls.append(tuple(q.shape))
        return sdpa_attention_forward(module, q, k, v, mask, **options)

    monkeypatch.setattr(attention, "_attend_strictly", recorded)
    monkeypatch.setattr(attention, "on_gpu", lambda tensor: True)
    tensors = draw(rows, torch.bfloat16)
    out, _ = attend(MODULE, *tensors, mask, pack=pack, scaling=0.3)
    whole, _ = sdpa_attention_forward(MODULE, *tensors, mask, scaling=0.3)
    torch.testing.assert_close(out, whole, atol=0.02, rtol=0.02)
    way = [(1, HEADS, 200, WIDTH)] if leaky else [(3, HEADS, 64, WIDTH), (1, HEADS, 192, WIDTH)]
    assert calls == way
    # A graph's capture can't ask the device what another mask shows: it goes the way of the warm-up before it.
    monkeypatch.setattr(attention, "capturing", lambda tensor: True)
    monkeypatch.setattr(attention, "shows_only", lambda *_: pytest.fail("a capture waits for the device"))
    attend(MODULE, *tensors, mask, pack=pack, scaling=0.3)
    assert calls == 2 * way


def test_in_fp32_the_mask_stays_whole(monkeypatch):
    rows, calls = ((5, 64),), []
    pack, mask = packed(rows)
    monkeypatch.setattr(
        attention, "_attend_strictly", lambda module, q, *rest, **options: (calls.append(tuple(q.shape)), None)
    )
    monkeypatch.setattr(attention, "on_gpu", lambda tensor: True)
    attend(MODULE, *draw(rows, torch.float32), mask, pack=pack)
    assert calls == [(1, HEADS, 69, WIDTH)]
