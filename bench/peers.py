"""What a user could pick instead, as arms of the same run: same weights, same packs, same gate."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from loop.config import Config


@dataclass(frozen=True)
class Peer:
    """summary says what it is and where it is not exactly what a user gets. change(config): its configuration."""

    name: str
    summary: str
    optimizations: tuple[str, ...]
    change: Callable[[Config], Config]
    needs_cuda: bool = True
    packages: tuple[str, ...] = ()

    def missing(self, device: torch.device) -> str | None:
        if self.needs_cuda and device.type != "cuda":
            return f"needs a CUDA device; this run is on {device.type}"
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"needs the package {absent[0]}, which is not installed" if absent else None


PEERS = (
    Peer(
        name="transformers_peft_fla",
        summary="transformers + PEFT + flash-linear-attention without checkpointing. The causal convolution is FLA's too: "
        "transformers' own reads across packed documents, and would fail the gate; so this peer is a little faster than "
        "what installing FLA gives",
        optimizations=("ssm_fast_path",),
        change=lambda config: dataclasses.replace(config, gradient_checkpointing=False),
        packages=("fla",),
    ),
)
