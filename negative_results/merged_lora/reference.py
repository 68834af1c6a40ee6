"""The reference: PEFT's own layer, in which base and adapter stay apart."""

from kernels.static_lora.reference import peft_layer

__all__ = ["peft_layer"]
