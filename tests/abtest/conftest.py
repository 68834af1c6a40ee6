"""Puts this folder on the path: pytest's importlib mode does not, and the helpers here are shared by its tests."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def one_thread():
    """One thread while a module runs: on a box shared with other work, two that wait for each other are far slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
