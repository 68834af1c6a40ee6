"""The weights at which gradients are compared: teacher forcing gives every arm the reference's.

A state is a file of fp32 tensors by canonical parameter name: everything that trains, and all vectors: norms, biases and
decay rates (A_log). So one state can have heads that forget slowly: with the decay rates a model is born with, a state that
leaks between documents has faded before anyone sees it. And one can have vectors that are uneven (`abtest/uneven.py`).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from abtest.patience import accumulated
from abtest.probes import Document, memorised_batch
from abtest.uneven import SPREAD, row_length, uneven, uneven_last
from loop.files import write_safetensors
from loop.model import canonical_name
from loop.run import Run

OVERFIT, SLOW, UNEVEN = "overfit", "slow decay", "uneven vectors"
SLOW_DECAY = 0.05  # A of every other head at the slow state
OVERFIT_STEPS, OVERFIT_LOSS = 150, 0.003  # at most so many; a mean loss of 0.003 is p(target) = 0.997
REACH = 25.0  # how large a logit must be able to get for p(target) -> 1 over some 100,000 columns


def names(steps: int) -> tuple[str, str, str, str]:
    """The four states of a free run: at the start, a third in (with slow heads), at the last step (with vectors that are
    uneven, and slow heads), and overfit."""
    return "step 0", f"step {steps // 3}, {SLOW}", f"step {steps - 1}, {UNEVEN}", OVERFIT


def is_slow(name: str) -> bool:
    """Whether it is the state with heads that forget slowly, in which a leak does not fade."""
    return name.endswith(SLOW)


def is_uneven(name: str) -> bool:
    """Whether it is the state in which norms, biases and the head's logits differ, as a trained model's do."""
    return name.endswith(UNEVEN)


def resync_steps(steps: int) -> tuple[int, ...]:
    """Before these steps every arm gets the reference's weights and moments, so that divergence can't add up."""
    return tuple(sorted({steps // 3, 2 * steps // 3} - {0}))


@dataclass(frozen=True)
class Held:
    """What a state sets, by canonical name, and the dtypes that it is rounded to: those that the run computes in."""

    parameters: dict[str, nn.Parameter]
    dtypes: dict[str, torch.dtype]

    @classmethod
    def of(cls, run: Run) -> Held:
        """What trains, and all vectors. Ask before an optimization is on, or the oracle is raised."""
        named = {canonical_name(name): parameter for name, parameter in run.model.named_parameters()}
        found = {name: p for name, p in named.items() if p.requires_grad or p.ndim == 1}
        return cls(found, {name: p.dtype for name, p in found.items()})

    @torch.no_grad()
    def save(self, run: Run, path: Path, state: str = "") -> None:
        """Writes the run's weights, the optimizer's fp32 masters where there are any, as the state of that name has them."""
        values = {
            name: run.optimizer.masters.get(name, parameter).detach().float().cpu().clone().contiguous()
            for name, parameter in self.parameters.items()
        }
        if is_slow(state) or is_uneven(state):  # what a bias does to a decay shows where heads remember
            _forget_slowly(values)
        if is_uneven(state):
            self._make_uneven(run, values)
        write_safetensors(path, values)

    def _make_uneven(self, run: Run, values: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(run.config.seed)
        before_head = run.model.get_decoder().norm.weight
        for name in sorted(name for name, value in values.items() if value.ndim == 1):
            if self.parameters[name] is before_head:
                row = row_length(run.model.get_output_embeddings().weight)
                values[name] = uneven_last(values[name], row, generator)
            else:
                values[name] = uneven(values[name], SPREAD, generator)

    @torch.no_grad()
    def load(self, path: Path | str) -> None:
        """Copies a state into the parameters, rounded as the run's own dtypes round."""
        for name, value in load_file(path).items():
            self.parameters[name].copy_(value.to(self.dtypes[name]))


def _forget_slowly(values: dict[str, torch.Tensor]) -> None:
    """Every other head of each layer."""
    for name, value in values.items():
        if name.endswith("A_log"):
            value[::2] = value[::2].clamp(max=math.log(SLOW_DECAY))


def overfit(run: Run, own: list[Document]) -> tuple[float, int]:
    """Trains until the model knows `own` by heart, p(target) -> 1: what is left of a gradient is then a small difference.

    Returns the mean loss reached and the steps taken. The rate falls off with width, as fine-tuning rates do; a loss that
    rises above twice its best halves it.
    """
    raise_logits(run)
    run.optimizer.adamw.state.clear()  # moments of gradients before the logits rose would make for wild first steps
    batch = memorised_batch(own).to(run.device)
    before = run.optimizer.config
    rate = (0.08 if run.config.method == "lora" else 0.02) / math.sqrt(run.model.config.hidden_size)
    loss, best, step = math.inf, math.inf, 0
    try:
        while step < OVERFIT_STEPS and loss > OVERFIT_LOSS:
            run.optimizer.config = dataclasses.replace(before, lr=rate, warmup_steps=5, min_lr_ratio=1.0)
            [total] = accumulated(run, [batch], batch.supervised_tokens)
            run.optimizer.step(step)
            step += 1
            loss = total / batch.supervised_tokens
            if loss > 2 * best:
                rate, best = rate / 2, loss
            best = min(best, loss)
    finally:
        run.optimizer.config = before
    return loss, step


@torch.no_grad()
def raise_logits(run: Run) -> None:
    """Scales the last norm where no hidden state could make a confident prediction, as with a small model's random head."""
    norm, head = run.model.get_decoder().norm, run.model.get_output_embeddings().weight
    width = head.shape[1]
    factor = REACH / (math.sqrt(width) * row_length(head))
    if factor <= 1:
        return
    hidden = torch.ones(1, width, dtype=run.dtype, device=run.device)
    wanted, weight = factor * norm(hidden), norm.weight.clone()
    for scaled in (factor * weight, factor * (1 + weight) - 1):  # a norm that multiplies by w, or by 1 + w
        norm.weight.copy_(scaled)
        if torch.allclose(norm(hidden).float(), wanted.float(), rtol=0.02):
            break
    master = run.optimizer.masters.get(_name_of(run, norm.weight))
    if master is not None:
        master.copy_(norm.weight)


def _name_of(run: Run, parameter: nn.Parameter) -> str:
    return next((name for name, p in run.optimizer.parameters.items() if p is parameter), "")
