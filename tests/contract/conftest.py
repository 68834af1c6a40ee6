"""Puts this folder on the path: pytest's importlib mode does not, and the helpers here are shared by its tests."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs that a CPU can replay, and one thread: two that wait for each other are far slower on a busy box."""
    from aten_tape import TapedGraph

    monkeypatch.setattr(torch.cuda, "CUDAGraph", TapedGraph)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
