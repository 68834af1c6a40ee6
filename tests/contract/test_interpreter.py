"""Kernels are interpreted without looking through Triton's language at every call, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from kernels.interpreter import exchange_language_once

if not triton.knobs.runtime.interpret:
    pytest.skip("kernels are compiled here", allow_module_level=True)


@triton.jit
def _twice(b_x):
    return b_x + b_x


@triton.jit
def _kernel(p_x, p_y, size, STEPS: tl.constexpr):
    o_x = tl.program_id(0) * 4 + tl.arange(0, 4)
    b_x = tl.load(p_x + o_x, mask=o_x < size, other=0.0)
    for _ in tl.range(STEPS):
        b_x = _twice(tl.maximum(b_x, tl.sum(b_x, axis=0) / 8))  # functions of ours, and of Triton's own
    tl.static_assert(STEPS > 0)
    tl.store(p_y + o_x, b_x, mask=o_x < size)


def launched(steps: int = 3) -> list[float]:
    x, y = torch.arange(-5.0, 5.0), torch.full((10,), 7.0)
    _kernel[(3,)](x, y, 10, STEPS=steps)
    return y.tolist()


def language() -> dict[tuple[int, str], int]:
    owners = (tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base)
    return {(id(owner), name): id(value) for owner in owners for name, value in vars(owner).items()}


def test_a_launch_computes_the_same(monkeypatch):
    expected = []
    for block in ([-5.0, -4.0, -3.0, -2.0], [-1.0, 0.0, 1.0, 2.0], [3.0, 4.0, 0.0, 0.0]):
        for _ in range(3):
            block = [2 * max(value, sum(block) / 8) for value in block]
        expected += block
    assert launched() == expected[:10]
    monkeypatch.setattr(interpreter, "_patch_lang", interpreter._patch_lang.__wrapped__)
    assert launched() == expected[:10]


@pytest.mark.parametrize("steps", [3, 0], ids=["to its end", "until it fails"])
def test_a_launch_leaves_the_language_as_it_was(steps):
    before = language()
    if steps:
        launched(steps)
    else:
        with pytest.raises(interpreter.InterpreterError):
            launched(steps)
    assert language() == before


def test_the_language_is_exchanged_once_a_launch(monkeypatch):
    exchange_language_once()  # tests/conftest.py did
    scopes, counted = [], interpreter._LangPatchScope.set_attr

    def set_attr(scope, owner, name, value):
        scopes.append((id(scope), id(owner), name))
        counted(scope, owner, name, value)

    monkeypatch.setattr(interpreter._LangPatchScope, "set_attr", set_attr)
    launched()
    assert len({scope for scope, _, _ in scopes}) == 1
    assert len(scopes) == len(set(scopes)) > 100


def test_a_process_that_compiles_is_left_alone(monkeypatch):
    monkeypatch.setattr(interpreter, "_patch_lang", original := interpreter._patch_lang.__wrapped__)
    with monkeypatch.context() as compiling:
        compiling.setattr("triton.knobs.runtime.interpret", False)
        exchange_language_once()
    assert interpreter._patch_lang is original
    exchange_language_once()
    assert interpreter._patch_lang.__wrapped__ is original
