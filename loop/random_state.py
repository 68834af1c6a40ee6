"""Random generators as they were, for whoever must draw nothing that the run would draw."""

from __future__ import annotations

import torch


class RandomState:
    """PyTorch's generators of the CPU and of a CUDA `device` as they are now, for `restore`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cpu = device, torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
