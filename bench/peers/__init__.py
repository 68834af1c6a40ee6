"""What a user could pick instead, as arms of the same run: the same weights, packs and adapters, somebody else's code.

Each peer is one file here, whose `build(peer, config)` makes a model ready for a step (`bench.peers.ready`), in a process of
its own (`bench.peers.worker`). What of that takes long and no GPU, its `ahead(config)`, if it has one, does before its turn.
Peers are gated as every other arm is, and timed whatever the gate says: what is fast because it leaks between documents is
what a reader would pick, and has to be beaten all the same. None of them ships.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

KERNELS, NAME = 40, 120  # device kernels that a record names, the most frequent first, and how much of a name


@dataclass(frozen=True)
class Peer:
    """summary says what it is and how it treats packs. module: its file here. packages: what must be importable.
    distributions: what a record names the version of, where it is installed. checkpointing: layers are recomputed. wrapped:
    a row of packed documents goes in as one text, without boundaries."""

    name: str
    summary: str
    module: str
    needs_cuda: bool = True
    packages: tuple[str, ...] = ()
    distributions: tuple[str, ...] = ()
    checkpointing: bool = False
    wrapped: bool = False

    @property
    def worker(self) -> tuple[str, ...]:
        """What the process of its arm runs."""
        return ("bench.peers.worker", self.name)

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run here at all, or None."""
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if absent:
            return f"needs the package {absent[0]}, which is not installed"
        if self.needs_cuda and device.type != "cuda":
            return f"needs a CUDA device; this run is on {device.type}"
        return None

    def versions(self) -> dict[str, str]:
        """Of the packages that it is made of, those that are installed."""
        found = {}
        for name in (*COMMON, *self.distributions):
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return found


COMMON = ("torch", "triton", "transformers", "peft")
FLA = ("flash-linear-attention", "fla-core", "causal-conv1d")
UNSLOTH = ("unsloth", "unsloth_zoo", "trl", "xformers", "bitsandbytes", *FLA)

PEERS = (
    Peer(
        "transformers_peft",
        "transformers + PEFT without FLA, with Trainer's gradient checkpointing. Packs come as transformers' own collator "
        "gives them; its pure-PyTorch delta rule and convolution pay no heed to boundaries",
        "transformers_peft",
        needs_cuda=False,
        checkpointing=True,
    ),
    Peer(
        "transformers_peft_fla",
        "the same with flash-linear-attention (and causal-conv1d, where it is installed) as transformers itself binds it, "
        "nothing recomputed. FLA's delta rule takes the boundaries, transformers' own convolution does not",
        "fla",
        packages=("fla",),
        distributions=FLA,
    ),
    Peer(
        "transformers_peft_fla_checkpointed",
        "transformers + PEFT + flash-linear-attention with Trainer's gradient checkpointing",
        "fla",
        packages=("fla",),
        distributions=FLA,
        checkpointing=True,
    ),
    Peer(
        "transformers_peft_liger",
        "transformers + PEFT, FLA where it is installed, and Liger's kernels for the model type, as Trainer's "
        "use_liger_kernel applies them; nothing recomputed",
        "liger",
        packages=("liger_kernel",),
        distributions=("liger-kernel", *FLA),
    ),
    Peer(
        "transformers_peft_compile",
        "transformers + PEFT, FLA where it is installed, every decoder layer compiled by torch.compile, the delta rule left "
        "out of the graphs, nothing recomputed",
        "compiled",
        needs_cuda=False,
        distributions=FLA,
    ),
    Peer(
        "unsloth",
        "Unsloth's FastLanguageModel with its own sample packing, nothing recomputed",
        "unsloth",
        packages=("unsloth", "unsloth_zoo"),
        distributions=UNSLOTH,
    ),
    Peer(
        "unsloth_checkpointed",
        "Unsloth's FastLanguageModel with its own sample packing and its own gradient checkpointing, which is its default",
        "unsloth",
        packages=("unsloth", "unsloth_zoo"),
        distributions=UNSLOTH,
        checkpointing=True,
    ),
    Peer(
        "unsloth_wrapped",
        "Unsloth's FastLanguageModel with every pack as one text, nothing recomputed: documents see each other, as with "
        "TRL's packing strategy wrapped; the least that Unsloth can do",
        "unsloth",
        packages=("unsloth", "unsloth_zoo"),
        distributions=UNSLOTH,
        wrapped=True,
    ),
)


def find(name: str) -> Peer:
    """The peer called `name`. Raises KeyError."""
    return {peer.name: peer for peer in PEERS}[name]


def facts(versions: Mapping[str, str], took: Mapping[str, Any], kernels: Mapping[str, int]) -> dict[str, Any]:
    """What a record says of a peer beside its numbers: versions, the path that it took, and the device kernels that ran in
    a micro-step with how often each."""
    frequent = sorted(kernels.items(), key=lambda item: (-item[1], item[0]))[:KERNELS]
    return {"versions": dict(versions), "took": dict(took), "kernels": {name[:NAME]: count for name, count in frequent}}
