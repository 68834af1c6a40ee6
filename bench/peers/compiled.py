"""transformers and PEFT with torch.compile, one region a decoder layer, which is PyTorch's own advice for repeated blocks.

The whole model in one graph would be compiled once a layer. The delta rule stays out of the graphs: in transformers' own
code it is a loop over chunks that would be unrolled, and FLA's kernels leave the graph by themselves. torch up to 2.11 takes
`torch.compiler.is_exporting()` for true while it compiles, and transformers then picks its PyTorch code whatever is bound;
outside the graph it picks what is bound.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType

import torch

from bench.peers import Peer
from bench.peers.fla import RULE
from bench.peers.ready import Ready, bound_kernels, modelling_of
from bench.peers.transformers_peft import stock
from loop.config import Config

RECOMPILATIONS = 64  # the gate feeds more shapes than training does; beyond PyTorch's 8 it would fall back without a word


def build(peer: Peer, config: Config) -> Ready:
    """Attention is transformers' own throughout: the reference's, which repeats itself, can't be compiled."""
    torch._dynamo.config.recompile_limit = RECOMPILATIONS
    modelling = modelling_of(config)
    ready = stock(peer, dataclasses.replace(config, repeatable_attention=False))
    outside = leave_out(modelling)
    layers = ready.model.get_decoder().layers
    for layer in layers:
        layer.compile()
    took = ready.took | {"compiled": f"{len(layers)} decoder layers", "outside the graphs": outside}
    # Times are of graphs for the shapes that training has, not of those that the gate's many shapes led to.
    return dataclasses.replace(ready, took=took, eager=False, before_timing=torch._dynamo.reset)


def leave_out(modelling: ModuleType) -> list[str]:
    """Keeps the delta rule, and whatever another package serves, out of graphs; returns which functions."""
    bound = bound_kernels(modelling)
    names = [name for name, kernel in bound.items() if name == RULE or not kernel.startswith("transformers.")]
    for name in names:
        setattr(modelling, name, torch.compiler.disable(getattr(modelling, name)))
    return sorted(names)
