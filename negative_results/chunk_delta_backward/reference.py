"""The reference: as `ssm_fast_path`'s, the loop's delta rule."""

from kernels.ssm_fast_path.reference import delta_rule

__all__ = ["delta_rule"]
