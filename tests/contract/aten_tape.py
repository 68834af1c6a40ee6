"""A CUDA graph on a CPU: operators are taped while they run once, and replayed on the same tensors.

As strict as a capture: what would make the host wait for the device, or copy what it made up, is refused; whatever was
computed while taping is spoilt, since a capture computes nothing; and transformers is told that a stream is being captured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero", "aten::equal",
    "aten::repeat_interleave", "aten::bincount", "aten::_unique2", "aten::unique_consecutive",
}  # fmt: skip
HOST_MADE = {"aten::lift_fresh", "aten::lift_fresh_copy"}  # what `torch.tensor` makes
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_"}
REFUSED = "operation not permitted when stream is capturing"


class TapedGraph:
    """Stands in for `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.tape: list[tuple[Callable[..., Any], tuple, dict, Any]] = []

    @torch.no_grad()
    def replay(self) -> None:
        for function, arguments, options, made in self.tape:
            again = function(*arguments, **options)
            if not function._schema.is_mutable:
                for old, new in zip(_tensors(made), _tensors(again), strict=True):
                    if not _shares(old, (arguments, options)):
                        old.copy_(new)

    @torch.no_grad()
    def spoil(self) -> None:
        for function, arguments, options, made in self.tape:
            for tensor in _tensors(made):
                if function._schema.is_mutable or _shares(tensor, (arguments, options)):
                    continue
                # .data: autograd is not to count this as a change of what a second tape will read
                tensor.data.fill_(math.nan if tensor.is_floating_point() else 0)


class _Taping(TorchDispatchMode):
    def __init__(self, graph: TapedGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._schema.name
        mask = name in INDEXED and any(index.dtype == torch.bool for index in _tensors(args[1]))
        if name in WAITS or name in HOST_MADE or mask:
            raise RuntimeError(f"{REFUSED}: {name}")
        made = function(*args, **kwargs)
        self.graph.tape.append((function, args, kwargs, made))
        return made


class TapeRecorder:
    """A recorder as `kernels.cuda_graphs.recorder.CudaRecorder` is one."""

    def __init__(self) -> None:
        self.warmed, self.full, self.released = 0, False, 0

    def crowded(self) -> bool:
        return self.full

    def release(self) -> None:
        self.released += 1

    def warm(self, work: Callable[[], None]) -> None:
        self.warmed += 1
        work()

    def record(self, work: Callable[[], None]) -> TapedGraph:
        graph = torch.cuda.CUDAGraph()  # a TapedGraph, where a test has put it there to be counted
        with capturing(), _Taping(graph):
            work()
        graph.spoil()
        return graph


@contextmanager
def capturing() -> Iterator[None]:
    before = torch.cuda.is_current_stream_capturing
    torch.cuda.is_current_stream_capturing = lambda: True
    try:
        yield
    finally:
        torch.cuda.is_current_stream_capturing = before


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _shares(tensor: torch.Tensor, arguments: Any) -> bool:
    place = tensor.untyped_storage().data_ptr()
    return any(argument.untyped_storage().data_ptr() == place for argument in _tensors(arguments))
