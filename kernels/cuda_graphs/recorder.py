"""Capture on a CUDA device: the one place of this folder that needs a GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

Work = Callable[[], None]


class CudaRecorder:
    """One side stream and one pool of memory for all graphs of a run.

    Graphs may lie over each other in the pool: no two of them run at once, and nothing in it outlives a replay. Warm-up and
    capture share the stream, because cuBLAS keeps a workspace for every stream, and autograd a stream for every parameter.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._begin()

    def _begin(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.taken = 0  # bytes

    def warm(self, work: Work) -> None:
        """Runs `work` as it will be captured, so that everything is compiled, tuned and allocated that it needs once."""
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            work()
        here.wait_stream(self.stream)

    def record(self, work: Work) -> torch.cuda.CUDAGraph:
        """Captures `work`, which computes nothing yet. Raises RuntimeError where it does what no graph can hold."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            before = torch.cuda.memory_reserved(self.device)
            work()
        self.taken += torch.cuda.memory_reserved(self.device) - before
        return graph

    def crowded(self) -> bool:
        """Whether a micro-step outside the pool would lack memory: it takes about what the pool has taken."""
        idle = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device) - self.taken
        return torch.cuda.mem_get_info(self.device)[0] + max(idle, 0) < self.taken

    def release(self) -> None:
        """Begins a pool of its own for whatever is captured next. The memory of the last one is free once its graphs are."""
        self._begin()
        gc.collect()
        torch.cuda.empty_cache()
