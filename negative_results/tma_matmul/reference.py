"""The reference is that of `sm121a_matmul`: the two are kernels for one product."""

from __future__ import annotations

from negative_results.sm121a_matmul.reference import linear_reference

__all__ = ["linear_reference"]
