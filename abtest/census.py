"""What a micro-step runs: operators, modules, device kernels, graph replays, and the FLOPs of its matrix products."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

from loop.lora import adapters
from loop.run import Run


class _Operators(TorchDispatchMode):
    """Counts what goes through PyTorch's dispatcher, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function._schema.name] += 1
        return function(*args, **(kwargs or {}))


def work(step: Callable[[], object], cuda: bool) -> dict[str, dict[str, int]]:
    """What `step` runs and keeps, counted by name: "operators" of the dispatcher, "modules" by class, "kernels" on the
    device, "kept": bytes that forward keeps for backward."""
    modules: Counter[str] = Counter()
    kept = [0]

    def called(module: nn.Module, arguments: object, output: object) -> None:
        modules[f"{type(module).__module__}.{type(module).__qualname__}"] += 1

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[0] += tensor.nbytes
        return tensor

    handle = register_module_forward_hook(called)
    try:
        with _Operators() as operators, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            step()
    finally:
        handle.remove()
    return {
        "operators": dict(sorted(operators.counts.items())),
        "modules": dict(sorted(modules.items())),
        "kernels": count_launches(step)[1] if cuda else {},
        "kept": {"bytes for backward": kept[0]},
    }


@dataclass(frozen=True)
class Change:
    """Two censuses side by side. new: names that the reference never runs. gone: names that it runs more often."""

    new: tuple[str, ...]
    gone: tuple[str, ...]

    @property
    def new_names(self) -> list[str]:
        return [name.rpartition(" x")[0] for name in self.new]


def changes(reference: dict[str, dict[str, int]], candidate: dict[str, dict[str, int]]) -> Change:
    new, gone = [], []
    for kind, counts in candidate.items():
        own = reference[kind]
        new += [f"{name} x{count}" for name, count in counts.items() if name not in own]
        gone += [f"{name} -{count - counts.get(name, 0)}" for name, count in own.items() if counts.get(name, 0) < count]
    return Change(tuple(new), tuple(gone))


@contextmanager
def counted_replays() -> Iterator[list[int]]:
    """Counts replays of CUDA graphs inside; the list holds one number."""
    count = [0]
    original = torch.cuda.CUDAGraph.replay

    def replay(graph) -> None:
        count[0] += 1
        original(graph)

    torch.cuda.CUDAGraph.replay = replay
    try:
        yield count
    finally:
        torch.cuda.CUDAGraph.replay = original


def count_launches(step: Callable[[], object]) -> tuple[int, dict[str, int]]:
    """Device kernels launched by `step`, in all and by name (the 60 most frequent)."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    counts: Counter[str] = Counter()
    # The raw events: PyTorch takes seconds to make objects of as many as a micro-step has.
    for event in trace.profiler.kineto_results.events():
        if event.device_type() == torch.autograd.DeviceType.CUDA and not event.name().startswith(("Memcpy", "Memset")):
            counts[event.name()] += 1
    frequent = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:60])
    return sum(counts.values()), frequent


def model_flops(run: Run) -> int:
    """FLOPs a position takes in the matrix products of forward and backward, recomputation not counted.

    2 forward and 2 for the input gradient for every weight, 2 more for every trained one. Attention scores and the delta
    rule are left out, so a fraction of the matrix rate computed from it is a lower bound.
    """
    held = {id(a.a) for a in adapters(run.model)} | {id(a.b) for a in adapters(run.model)}
    total = 0
    for module in run.model.modules():
        if isinstance(module, nn.Linear) and id(module.weight) not in held:
            total += (6 if module.weight.requires_grad else 4) * module.weight.numel()
    for adapter in adapters(run.model):
        total += 6 * (adapter.a.numel() + adapter.b.numel())
    return total
