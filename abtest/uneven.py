"""Vectors and a head as a trained model has them, where random weights leave them all alike.

Norms that multiply by 1, biases that are all the same and logits that hardly differ hide what goes wrong with them: a norm
that is taken behind its weight, a bias of another head, or a loss head that leaves small probabilities out. With adapters
nothing of this trains, so it stays hidden. A trained model's own vectors are as good, and stay what they are.
"""

from __future__ import annotations

import math

import torch

SPREAD = 0.5  # a vector's elements are multiplied by e^-0.5 to e^0.5
ALIKE = 0.1  # as long as their deviation is less than so much of their mean
# The last norm's are multiplied by e^-3 to e^3, and then all by as much as gives logits this deviation. A softmax over some
# 100,000 columns then has a tail in which most of the probability lies, each of it small. What the tail's rows add up to
# points along the hidden state where the head is random, and the backward of a norm whose weights are all alike takes that
# direction out; with these weights it does not.
SPREAD_LAST, LOGITS = 3.0, 2.0


def uneven(values: torch.Tensor, spread: float, generator: torch.Generator) -> torch.Tensor:
    """What a vector [D] multiplies by, or adds, times e^(-spread) to e^spread; itself where its elements already differ.
    One that lies around zero is taken for a norm that multiplies by 1 + w, or a bias: 1 + w is what is multiplied."""
    offset = _offset(values)
    whole = values.double() + offset
    factors = torch.empty(len(values), dtype=torch.float64).uniform_(-spread, spread, generator=generator).exp_()
    if len(values) < 2 or float(whole.std()) > ALIKE * abs(float(whole.mean())):
        return values
    return (whole * factors - offset).to(values.dtype)


def uneven_last(weight: torch.Tensor, row: float, generator: torch.Generator) -> torch.Tensor:
    """The same for the norm [D] before a head whose rows have the length `row` (root mean square), raised to
    `LOGITS`; itself where logits differ as much already."""
    offset = _offset(weight)
    if row * _rms(weight.double() + offset) >= LOGITS:
        return weight
    spread = uneven(weight, SPREAD_LAST, generator).double() + offset
    return (spread * LOGITS / (row * _rms(spread)) - offset).to(weight.dtype)


def row_length(head: torch.Tensor) -> float:
    """The root mean square of the lengths of the rows of a head [V, D], in fp32 without a copy of it in fp32."""
    return _rms(torch.linalg.vector_norm(head, dim=1, dtype=torch.float32))


def _offset(values: torch.Tensor) -> float:
    return 1.0 if abs(float(values.double().mean())) < 0.5 else 0.0


def _rms(values: torch.Tensor) -> float:
    return math.sqrt(float(values.square().mean()))
