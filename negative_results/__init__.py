"""Optimizations that ship on no measured device: the same folder shape as `kernels/`, plus the evidence."""
