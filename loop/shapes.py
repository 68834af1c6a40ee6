"""Named model shapes, built with random weights when there is no checkpoint.

The Qwen3 and Qwen3.5 sizes are the text models' published configurations; the tiny ones keep their structure (of Qwen3.5
three gated-delta layers to one of full attention, grouped query heads, rope on a quarter) at a size that two CPU cores
train in seconds. The shallow ones have two layers, one of either kind where there are two, for tests of the gate and for
Triton's interpreter; in the turned one attention comes first, so that the gated-delta layer's input gets a gradient that
something below it trains on.
"""

from __future__ import annotations

from typing import Any

_QWEN35 = {"vocab_size": 248_320, "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 16,
           "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000.0,
                                                            "partial_rotary_factor": 0.25}}  # fmt: skip
_TINY = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True}  # fmt: skip
_TINY_DELTA = {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 2,
               "linear_num_value_heads": 4}  # fmt: skip

# name -> (transformers model type, configuration). A tiny shape takes its vocabulary from the tokenizer.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3.5-tiny": ("qwen3_5_text", _TINY | _TINY_DELTA),
    "qwen3.5-shallow-tiny": ("qwen3_5_text", _TINY | _TINY_DELTA | {
        "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}),
    "qwen3.5-turned-tiny": ("qwen3_5_text", _TINY | _TINY_DELTA | {
        "num_hidden_layers": 2, "layer_types": ["full_attention", "linear_attention"]}),
    "qwen3.5-0.8b": ("qwen3_5_text", _QWEN35 | {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24,
                                                "num_attention_heads": 8, "num_key_value_heads": 2}),
    "qwen3.5-2b": ("qwen3_5_text", _QWEN35 | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24,
                                              "num_attention_heads": 8, "num_key_value_heads": 2}),
    "qwen3.5-4b": ("qwen3_5_text", _QWEN35 | {"hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32,
                                              "num_attention_heads": 16, "num_key_value_heads": 4,
                                              "linear_num_value_heads": 32}),
    "qwen3-1.7b": ("qwen3", {"vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
                             "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
                             "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default",
                                                                              "rope_theta": 1_000_000.0}}),
    "qwen3-tiny": ("qwen3", _TINY),
    "qwen3-shallow-tiny": ("qwen3", _TINY | {"num_hidden_layers": 2}),
    "qwen2-tiny": ("qwen2", {key: value for key, value in _TINY.items() if key != "head_dim"}),
    "llama-tiny": ("llama", _TINY),
    "mistral-tiny": ("mistral", _TINY | {"sliding_window": 96}),
}  # fmt: skip


def is_tiny(name: str) -> bool:
    return name.endswith("-tiny")
