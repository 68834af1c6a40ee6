"""transformers and PEFT with Liger's kernels, applied as Trainer applies them for `use_liger_kernel=True`.

For Qwen3.5 that is RMSNorm, SiLU x up of the MLP, and the fused linear cross-entropy; the record names what was patched.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

from torch import nn

from bench.peers import Peer
from bench.peers.ready import Ready, Unavailable, modelling_of
from bench.peers.transformers_peft import stock
from loop.config import Config


def build(peer: Peer, config: Config) -> Ready:
    """Raises Unavailable for a model type that Liger has no kernels for, RuntimeError where it patched nothing."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from transformers.integrations.liger import apply_liger_kernel

    modelling_of(config)
    ready = stock(peer, config)
    model_type = ready.model.config.model_type
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise Unavailable(f"Liger has no kernels for the model type {model_type}")
    apply_liger_kernel(ready.model, None)
    patched = patched_by(ready.model, "liger_kernel")
    if not patched:
        raise RuntimeError(f"Liger's {MODEL_TYPE_TO_APPLY_LIGER_FN[model_type].__name__} patched no module of the model")
    applied = {"liger": MODEL_TYPE_TO_APPLY_LIGER_FN[model_type].__name__, "patched": patched}
    return dataclasses.replace(ready, took=ready.took | applied)


def patched_by(model: nn.Module, package: str) -> dict[str, int]:
    """Modules whose `forward` was replaced by one of `package`: "class: new forward" -> how many."""
    found: Counter[str] = Counter()
    for module in model.modules():
        forward = vars(module).get("forward")
        function = getattr(forward, "__func__", forward)
        if function is not None and function.__module__.startswith(package):
            found[f"{type(module).__name__}: {function.__module__}.{function.__qualname__}"] += 1
    return dict(sorted(found.items()))
