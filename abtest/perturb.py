"""References kicked by half an ulp: how far apart two equally good runs are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from abtest.patience import PATIENCE, patiently
from loop.run import Run


@dataclass(frozen=True)
class Start:
    """Copies of what a run begins with, so that the next replica need not be built: every weight, frozen ones too, and the
    optimizer's state. On the host, whose memory is not scarce."""

    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]

    @classmethod
    def of(cls, run: Run) -> Start:
        """`run` has not trained yet."""
        return cls(_on_host(dict(run.model.named_parameters())), _on_host(run.optimizer.state()))

    @torch.no_grad()
    def restore(self, run: Run) -> None:
        """Takes `run`, whose weights and moments have moved, back to where it began."""
        for name, parameter in run.model.named_parameters():
            parameter.copy_(self.weights[name])
        run.optimizer.load_state(self.optimizer)
        run.optimizer.zero_grad()


def _on_host(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}


@torch.no_grad()
def kick(run: Run, seed: int, trained_only: bool = False, patience: float = PATIENCE) -> None:
    """Moves every weight of the model, frozen ones too unless `trained_only`, by half an ulp of its dtype on average.

    A weight goes to its upper or lower neighbour with probability a quarter each and stays otherwise. Frozen weights are
    kicked as well because LoRA's B starts at zero: kicking A alone would move nothing at the first step. patience: seconds
    for which each weight waits for memory, several times its own.
    """
    generator = torch.Generator(device=run.device).manual_seed(seed)
    for parameter in run.model.parameters():
        if trained_only and not parameter.requires_grad:
            continue
        kicked = partial(_kicked, parameter, generator, generator.get_state())
        parameter.copy_(patiently(kicked, torch.cuda.empty_cache, patience))
    for name, master in run.optimizer.masters.items():
        parameter = run.optimizer.parameters[name]
        if master is not parameter:
            master.copy_(parameter)


def _kicked(parameter: torch.Tensor, generator: torch.Generator, begun: torch.Tensor) -> torch.Tensor:
    """begun: the state that the generator draws from, however often it is asked."""
    generator.set_state(begun)
    draw = torch.rand(parameter.shape, generator=generator, device=parameter.device)
    towards = torch.where(draw < 0.5, torch.inf, -torch.inf).to(parameter.dtype)
    moved = torch.nextafter(parameter, towards)
    chosen = ((draw < 0.25) | (draw > 0.75)) & (parameter != 0)
    return torch.where(chosen, moved, parameter)
