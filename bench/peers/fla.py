"""transformers and PEFT with flash-linear-attention bound by transformers itself, which is what installing FLA gives.

transformers hands FLA's delta rule the boundaries of documents. Its convolution goes to causal-conv1d where that is
installed, which takes them too, and is otherwise PyTorch's, which reads the last three positions of the document before.
"""

from __future__ import annotations

import importlib

from bench.peers import Peer
from bench.peers.ready import Ready, Unavailable, bound_kernels, modelling_of
from bench.peers.transformers_peft import stock
from loop.config import Config

RULE = "torch_chunk_gated_delta_rule"  # transformers' name for it, whatever it is bound to


def build(peer: Peer, config: Config) -> Ready:
    """Raises Unavailable for a model without gated-delta layers, RuntimeError where transformers did not take FLA."""
    importlib.import_module("fla.ops.gated_delta_rule")  # transformers would leave FLA out without a word if this failed
    bound = bound_kernels(modelling_of(config))
    if RULE not in bound:
        raise Unavailable("the model has no gated-delta layers, so installing FLA changes nothing")
    if not bound[RULE].startswith("fla."):
        raise RuntimeError(f"FLA is installed, but transformers bound {bound[RULE]} for the delta rule")
    return stock(peer, config)
