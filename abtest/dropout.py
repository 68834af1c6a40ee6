"""Check 5, with dropout on: masks move on, follow the seed, and backward uses the one that forward drew.

The gate's oracle drops nothing out, since two implementations need not draw the same mask; so here an arm is only compared
with itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from abtest import fingerprint as fp
from abtest.structure import Finding
from loop.batch import PackedBatch
from loop.config import Config
from loop.run import Run
from loop.training import accumulate

RATE = 0.25
STEP, TOLERANCE = 2**-10, 0.01  # of the finite difference; honest runs are off by 0.0005 at most
FILL = 0.1  # standard deviation of B, which starts at zero and would hide all that A does; at 0.2 the loss curves too much


def dropout_config(config: Config) -> Config:
    """The same run with dropout in its adapters."""
    return dataclasses.replace(config, lora=dataclasses.replace(config.lora, dropout=RATE))


def examine(run: Run, batch: PackedBatch, on_step: Callable[[int, int], None]) -> list[Finding]:
    """Findings about a run that was built with `dropout_config`. Finite differences need fp32; a bf16 run goes without."""
    _fill(run)
    first, again, other = (_losses_and_gradients(run, batch, seed) for seed in (1, 1, 2))
    torch.manual_seed(3)
    one, next_one = (_loss(run, batch) for _ in range(2))
    found = [
        Finding("dropout: the same seed gives the same bits", first == again),
        Finding("dropout: another seed gives another mask", first[0] != other[0]),
        Finding("dropout: every micro-step draws a new mask", one != next_one),
    ]
    on_step(1, 2)
    if run.dtype == torch.float32:
        found.append(_derivative(run, batch))
    on_step(2, 2)
    return found


@torch.no_grad()
def _fill(run: Run) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in run.optimizer.parameters.items():
        if ".lora_B." in name:
            drawn = FILL * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn)


def _loss(run: Run, batch: PackedBatch) -> float:
    run.optimizer.zero_grad()
    loss = accumulate(run, [batch], batch.supervised_tokens)[0]
    return loss


def _losses_and_gradients(run: Run, batch: PackedBatch, seed: int) -> tuple[float, str]:
    torch.manual_seed(seed)
    loss = _loss(run, batch)
    mark = fp.fingerprint(run.optimizer.gradients())
    run.optimizer.zero_grad()
    return loss, mark


def _derivative(run: Run, batch: PackedBatch) -> Finding:
    """The slope of the loss along the gradient, masks held by the seed, beside the gradient's own length."""
    torch.manual_seed(1)
    _loss(run, batch)
    gradients = {name: gradient.clone() for name, gradient in run.optimizer.gradients().items() if gradient is not None}
    run.optimizer.zero_grad()
    norm = torch.stack([gradient.double().square().sum() for gradient in gradients.values()]).sum().sqrt()
    sides = []
    for sign in (1, -1):
        _move(run, gradients, sign * STEP / float(norm))
        torch.manual_seed(1)
        sides.append(_loss(run, batch) / max(batch.supervised_tokens, 1))
        _move(run, gradients, -sign * STEP / float(norm))
    run.optimizer.zero_grad()
    slope = (sides[0] - sides[1]) / (2 * STEP)
    error = abs(slope / float(norm) - 1)
    return Finding("dropout: backward uses forward's mask", error <= TOLERANCE, f"slope is off by {error:.2g}")


@torch.no_grad()
def _move(run: Run, gradients: dict[str, torch.Tensor], by: float) -> None:
    for name, gradient in gradients.items():
        run.optimizer.parameters[name].add_(gradient, alpha=by)
