"""Who holds a run's memory: weights, masters, moments and gradients by their tensors, what forward keeps for backward."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from abtest.stopwatch import staying_memory
from loop.batch import PackedBatch
from loop.run import Run

OWNERS = ("trained", "frozen", "masters", "moments", "gradients")  # a storage belongs to the first that has it
WORDS = {
    "frozen": "frozen weights",
    "trained": "trained weights",
    "masters": "fp32 master copies",
    "moments": "AdamW's moments",
    "gradients": "gradients",
    "activations": "kept for backward by the layers",
    "loss": "logits and loss, at their largest",
    "rest": "everything else that stays",
    "peak": "peak of the measured steps",
    "reserved": "held by PyTorch's allocator",
}

COUNTED = "allocator, and pools of graphs"  # where the peak is at least what graphs hold

Storages = dict[int, int]  # address -> bytes


def storages(tensors: Iterable[torch.Tensor | None], device: torch.device) -> Storages:
    """The storages on `device` behind tensors; one that several share is there once."""
    found = {}
    for tensor in tensors:
        if tensor is not None and tensor.device.type == device.type and tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return {address: size for address, size in found.items() if size}


def held(run: Run) -> dict[str, Storages]:
    """What a run holds between forward passes, by owner; no storage belongs to two."""
    parameters = list(run.model.parameters())
    state = run.optimizer.state()
    tensors = {
        "trained": [p for p in parameters if p.requires_grad],
        "frozen": [*(p for p in parameters if not p.requires_grad), *run.model.buffers()],
        "masters": [value for name, value in state.items() if name.startswith("master.")],
        "moments": [value for name, value in state.items() if not name.startswith("master.")],
        "gradients": [*run.optimizer.gradients().values(), *(p.grad for p in parameters)],
    }
    return disjoint({name: storages(tensors[name], run.device) for name in OWNERS})


def disjoint(owners: Mapping[str, Storages]) -> dict[str, Storages]:
    """Each storage with the first owner that has it."""
    taken: set[int] = set()
    found = {}
    for name, own in owners.items():
        found[name] = {address: size for address, size in own.items() if address not in taken}
        taken |= set(own)
    return found


def by_owner(run: Run, batch: PackedBatch) -> dict[str, Any]:
    """Bytes by the keys of `WORDS`, but for "peak" and "reserved", from one micro-step that is not replayed from a graph.

    The optimizer has stepped before, so its moments are there. On CUDA the allocator tells what the layers keep and how
    large the loss head grows; on a CPU what autograd saves is added up, and "rest" is None. "counted_by" says which.
    """
    kept = _by_allocator(run, batch) if run.device.type == "cuda" else _by_saved_tensors(run, batch)
    return {name: sum(own.values()) for name, own in held(run).items()} | kept(held(run))


def _by_allocator(run: Run, batch: PackedBatch) -> Callable[[dict[str, Storages]], dict[str, Any]]:
    device, marks = run.device, {"activations": 0, "loss": 0}
    run.optimizer.zero_grad()
    before = torch.cuda.memory_allocated(device)

    def head(model: nn.Module, hidden: torch.Tensor, own: PackedBatch) -> torch.Tensor:
        at_entry = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        loss = inner(model, hidden, own)
        grown = torch.cuda.max_memory_allocated(device) - at_entry
        marks.update(activations=max(marks["activations"], at_entry - before), loss=max(marks["loss"], grown))
        return loss

    inner, run.loss_head = run.loss_head, head
    try:
        _plainly(run, batch)
    finally:
        run.loss_head = inner
    after = torch.cuda.memory_allocated(device)

    def kept(owners: dict[str, Storages]) -> dict[str, Any]:
        known = sum(sum(own.values()) for own in owners.values())
        return marks | {"rest": max(0, after - known), "counted_by": COUNTED}

    return kept


def _by_saved_tensors(run: Run, batch: PackedBatch) -> Callable[[dict[str, Storages]], dict[str, Any]]:
    saved: dict[str, Storages] = {"activations": {}, "loss": {}}
    where = ["activations"]
    alive: list[torch.Tensor] = []  # so that no address is given out twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if where[0] in saved:
            alive.append(tensor.detach())
            saved[where[0]] |= storages([tensor], run.device)
        return tensor

    def head(model: nn.Module, hidden: torch.Tensor, own: PackedBatch) -> torch.Tensor:
        where[0] = "loss"
        try:
            return inner(model, hidden, own)
        finally:
            where[0] = "backward"  # what it recomputes is kept for a layer at a time

    run.optimizer.zero_grad()
    inner, run.loss_head = run.loss_head, head
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            _plainly(run, batch)
    finally:
        run.loss_head = inner

    def kept(owners: dict[str, Storages]) -> dict[str, Any]:
        own = disjoint(owners | {name: saved[name] for name in ("activations", "loss")})
        sizes = {name: sum(own[name].values()) for name in ("activations", "loss")}
        return sizes | {"rest": None, "counted_by": "saved tensors"}

    return kept


def _plainly(run: Run, batch: PackedBatch) -> None:
    """A micro-step in Python: one that is replayed from a graph passes no seam and allocates nothing. A hook on all modules
    is what makes a graphed micro-step step aside."""
    handle = register_module_forward_hook(lambda module, arguments, output: None)
    try:
        run.micro_step(run, batch, batch.supervised_tokens)
    finally:
        handle.remove()


def peaks(device: torch.device) -> dict[str, int | None]:
    """Peak since the statistics were reset, without memory of graphs, and what the allocator holds, with it; on a CPU the
    resident memory of the process so far."""
    if device.type == "cuda":
        return {"peak": torch.cuda.max_memory_allocated(device), "reserved": torch.cuda.memory_reserved(device)}
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "reserved": None}


def with_graphs(found: dict[str, int | None], device: torch.device) -> dict[str, int | None]:
    """What `peaks` found, on CUDA with a peak of at least what stays with the process, memory of graphs included."""
    return found | {"peak": max(found["peak"], staying_memory(device))} if device.type == "cuda" else found
