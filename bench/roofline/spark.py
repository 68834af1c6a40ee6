"""DGX Spark (GB10), which nobody measured for this project: what others have published of it."""

from __future__ import annotations

from bench.ceilings import Ceilings

NAME = "DGX Spark (GB10)"
MODEL, METHOD = "qwen3.5-2b", "lora"  # what the published rate is taken to be of
PUBLISHED_TOKENS_PER_S = 3461

# Measured by users of the device: 218 GB/s of a nominal 273, 92 TFLOP/s dense bf16 of a nominal 125.
CEILINGS = Ceilings(218e9, 92e12, copied_bytes=0, matmul_size=0, matmul_dtype="bfloat16")
MATMUL_RANGE = (75e12, 102e12)  # of the same measurements, by shape
LAUNCH_US = (10.0, 28.0)  # on its Arm host; 28 is 56 s over 2 million launches, from the run that was published

PROVENANCE = (
    ("copy bandwidth", "218 GB/s", "measured by a user in an issue of a public kernel library; nominal 273"),
    ("dense bf16 products", "92 TFLOP/s", "measured by users, 75 to 102 by shape; nominal 125"),
    ("a launch", "10 to 28 µs", "reported of its Arm host; 28 is 56 s over 2 million launches of the published run"),
    ("published", "3,461 tokens/s", "beside 451 for its own stock; taken to be LoRA of this model"),
)
