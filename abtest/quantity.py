"""How far a result is from the truth, beside how far the reference is: two ratios, because one statistic is not enough.

A largest error alone accepts a result scaled by 1.004, a mean error alone accepts one zeroed row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_RATIO = 2.0  # candidate's over reference's largest error
MEAN_RATIO = 1.1  # the same for the mean error
FEW = 64  # fewer values than this are no statistic


@dataclass(frozen=True)
class Quantity:
    """One output or gradient of one check. Errors are absolute, against fp64 truth; ratios are candidate over reference."""

    name: str
    max_ratio: float
    mean_ratio: float
    max_error: float
    mean_error: float
    reference_max_error: float
    reference_mean_error: float
    same_bits: bool

    @property
    def within_limits(self) -> bool:
        return self.max_ratio <= MAX_RATIO and self.mean_ratio <= MEAN_RATIO


def compare(
    name: str, truth: Tensor, reference: Tensor, candidate: Tensor, nudged: tuple[float, float] = (0.0, 0.0)
) -> Quantity:
    """Errors of two results of one dtype against fp64 truth, all of one shape. nudged: the largest and the mean error that
    rounding the inputs would have made, which is added to the reference's as an independent error is.

    A reference error counts as at least what correct rounding of values of this size costs (a quarter of eps of the
    largest, an eighth of eps of the mean magnitude; twice eps of the largest where there are fewer than 64 values, since
    luck rules there). No op that rounds at all is below that, so it matters only where the reference is exact by luck or
    by nature (a copy): there the candidate must be exact too, up to half a unit in the last place of the largest value.
    Where truth is all zero, only an exact zero passes. Results that are not floating-point must be equal.
    """
    same = same_bits(reference, candidate)
    if truth.numel() == 0 or not reference.is_floating_point():
        ratio = 0.0 if truth.numel() == 0 or torch.equal(reference, candidate) else math.inf
        return Quantity(name, ratio, ratio, ratio, ratio, 0.0, 0.0, same)
    eps, size = torch.finfo(reference.dtype).eps, truth.abs()
    largest, mean = size.max().item(), size.mean().item()
    few = truth.numel() < FEW
    of_reference, of_candidate = (reference.double() - truth).abs(), (candidate.double() - truth).abs()
    max_error, mean_error = of_candidate.max().item(), of_candidate.mean().item()
    reference_max, reference_mean = of_reference.max().item(), of_reference.mean().item()
    max_scale, mean_scale = math.hypot(reference_max, nudged[0]), math.hypot(reference_mean, nudged[1])
    max_ratio = _ratio(max_error, max(max_scale, (2 if few else 0.25) * eps * largest))
    mean_ratio = _ratio(mean_error, max(mean_scale, 2 * eps * largest if few else 0.125 * eps * mean))
    return Quantity(name, max_ratio, mean_ratio, max_error, mean_error, reference_max, reference_mean, same)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal in shape, dtype and every bit: NaN equals itself, and +0 differs from -0."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(side.detach().contiguous().reshape(-1).view(torch.uint8) for side in (one, other)))


def _ratio(error: float, reference_error: float) -> float:
    if math.isnan(error):
        return math.inf
    if reference_error == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / reference_error
