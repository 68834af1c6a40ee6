"""The least time a training step can take on a device, part by part, and what that predicts.

Bytes and FLOPs are those of the ops in `kernels/`; ceilings and efficiencies are those of a device's records.
"""

from bench.roofline.page import device_page, page

__all__ = ["device_page", "page"]
