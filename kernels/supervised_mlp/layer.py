"""A last decoder layer that tells its MLP which positions count, on the modules that it replaces."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from .kernel import on_rows


class SupervisedMLP:
    """Before an MLP's own class: x [B, L, D] -> [B, L, D], zeros where nothing is supervised. Without rows, all."""

    supervised_rows: torch.Tensor | None = None  # only while the layer's forward runs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, whole = self.supervised_rows, super().forward
        return whole(x) if rows is None else on_rows(whole, x, rows)


class SupervisedLayer:
    """Before a decoder layer's own class: its forward, which says to its MLP what of the pack is supervised. Checkpointing,
    which computes a forward again, comes by here again, too."""

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        pack = keywords.get("pack")
        self.mlp.supervised_rows = None if pack is None else pack.rows
        try:
            return super().forward(*arguments, **keywords)
        finally:
            self.mlp.supervised_rows = None


@functools.cache
def _joined(first: type, own: type[nn.Module]) -> type[nn.Module]:
    """A class of both, an `own` still: checkpointing and whoever looks for such modules find what they look for."""
    return type(f"{first.__name__}Of{own.__name__}", (first, own), {"__module__": __name__})


def with_rows(first: type, module: nn.Module) -> nn.Module:
    """`module`, its parameters, submodules and plain attributes, as one of class `first` before its own."""
    made = object.__new__(_joined(first, type(module)))
    made.__dict__.update(module.__dict__)
    return made
