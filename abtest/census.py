"""Which kernels a micro-step launches, and how many FLOPs its matrix products take."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from loop.lora import adapters
from loop.run import Run


def count_launches(step: Callable[[], object]) -> tuple[int, dict[str, int]]:
    """Device kernels launched by `step`, in all and by name (the 60 most frequent)."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        step()
        torch.cuda.synchronize()
    counts: dict[str, int] = {}
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset")):
            counts[event.name] = counts.get(event.name, 0) + 1
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
