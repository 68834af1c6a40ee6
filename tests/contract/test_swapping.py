"""Whether a module's place can be taken without anybody noticing."""

from __future__ import annotations

import pytest
from torch import nn

from kernels.swapping import is_watched


@pytest.mark.parametrize("register", [
    "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook",
])  # fmt: skip
def test_whoever_hooks_into_its_calls_watches(register):
    layer = nn.Linear(2, 2)
    assert not is_watched(layer)
    handle = getattr(layer, register)(lambda *called: None)
    assert is_watched(layer)
    handle.remove()
    assert not is_watched(layer)


def test_a_forward_of_its_own_would_be_lost():
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: x
    assert is_watched(layer)


def test_saving_and_loading_find_the_same_names_afterwards():
    layer = nn.Linear(2, 2)
    layer.register_state_dict_post_hook(lambda *called: None)
    layer.register_load_state_dict_post_hook(lambda *called: None)
    assert not is_watched(layer)
