"""What a graph cannot follow: the Python of the model, and whoever watches it run."""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain, repeat
from operator import attrgetter, contains, is_, itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules import module as modules
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from loop.run import Run

HOLDS = ("_modules", "_parameters", "_buffers")  # the dictionaries in which a module holds what it is made of
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Baked:
    """Everything of a run that is baked into its graphs. Asked at every micro-step, while the device waits: so each question
    is a dictionary's, and put to thousands of them without a line of Python for each.

    What a run held is held here too: nothing new can come to lie at the address of what is gone, and pass for it.
    """

    def __init__(self, run: Run) -> None:
        self.seams, self.settings = _seams(run), _settings(run)
        self.own = [module.__dict__ for module in run.model.modules()]
        self.made_of = [own[kind] for own in self.own for kind in HOLDS if own[kind]]
        self.sizes, self.parts, self.flags = _sizes(self.made_of), _parts(self.made_of), _flags(self.own)
        self.tensors = [part for part in self.parts if isinstance(part, torch.Tensor)]
        self.places = _places(self.tensors)

    def holds(self, run: Run) -> bool:
        """Whether the run is still made of the same objects, at the same addresses, with the same settings."""
        return (
            _same(self.seams, _seams(run))
            and self.settings == _settings(run)
            and self.sizes == _sizes(self.made_of)
            and _same(self.parts, _parts(self.made_of))
            and self.flags == _flags(self.own)
            and self.places == _places(self.tensors)
        )


def _seams(run: Run) -> tuple[Any, ...]:
    return run.model, run.loss_head, run.optimizer


def _settings(run: Run) -> tuple[Any, ...]:
    """What chooses kernels."""
    return (
        run.model.config._attn_implementation,
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled(run.device.type),
    )


def _same(before: Collection[Any], now: Collection[Any]) -> bool:
    return len(before) == len(now) and all(map(is_, before, now))


def _sizes(made_of: list[dict[str, Any]]) -> list[int]:
    return list(map(len, made_of))


def _parts(made_of: list[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, made_of)))


def _flags(own: list[dict[str, Any]]) -> tuple[list[Any], ...]:
    """Of all modules: whether it trains, whether it recomputes, whether it has a forward of its own."""
    return (
        list(map(itemgetter("training"), own)),
        list(map(dict.get, own, repeat("gradient_checkpointing"))),
        list(map(contains, own, repeat("forward"))),
    )


def _places(tensors: list[torch.Tensor]) -> tuple[list[Any], ...]:
    """Where they lie, and which want a gradient."""
    return list(map(torch.Tensor.data_ptr, tensors)), list(map(attrgetter("requires_grad"), tensors))


class Onlookers:
    """Hooks on the model's modules. Those that a run begins with belong to it; a later one wants to see Python run."""

    def __init__(self, model: nn.Module) -> None:
        self.known = {id(hook): hook for hook in _hooks(model)}
        self.asked_at, self.watching = RemovableHandle.next_id, False

    def new(self, model: nn.Module) -> bool:
        """Whether a module has a hook that it did not have at first. Looked at again only once there are more hooks than
        there were, anywhere, or where there was one."""
        if self.watching or RemovableHandle.next_id != self.asked_at:
            self.asked_at = RemovableHandle.next_id
            self.watching = any(id(hook) not in self.known for hook in _hooks(model))
        return self.watching


def _hooks(model: nn.Module) -> list[Any]:
    return [hook for module in model.modules() for kind in HOOKS for hook in module.__dict__[kind].values()]


def watcher() -> str | None:
    """Who would see nothing of a replay, in words, or None."""
    if not torch.is_grad_enabled():
        return "gradients are off"
    if _get_current_dispatch_mode() is not None:
        return "a dispatch mode watches the operators"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "hooks watch what is saved for backward"
    if modules._has_any_global_hook():
        return "global hooks watch every module"
    if torch.is_anomaly_enabled():
        return "anomaly detection is on"
    return None
