"""AdamW on fp32 master copies of what trains, with warm-up, cosine decay and clipping."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from loop.config import OptimConfig

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's own names


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate of 0-based `step`: linear warm-up over `warmup_steps`, then a cosine to `min_lr_ratio` at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


@dataclass
class Waiting:
    """gradients: what nobody has added yet, by master, in the parameters' dtype. wanted: whether anything is to wait.
    places: fp32 tensors for the first gradient of a master, by master."""

    wanted: bool = False
    gradients: dict[torch.Tensor, torch.Tensor] = field(default_factory=dict)
    places: Mapping[torch.Tensor, torch.Tensor] = field(default_factory=dict)


class MasterAdamW:
    """torch's AdamW over fp32 masters of `parameters` (canonical name -> parameter).

    A parameter of another dtype gets an fp32 copy, and its gradient is added to the copy's in fp32 as soon as backward
    has made it, so that accumulation over micro-steps does not round in bf16. Tensors of fewer than two dimensions
    (norms, biases, decay rates) are not decayed.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], config: OptimConfig, steps: int) -> None:
        self.config, self.steps = config, steps
        self.hooks: list[RemovableHandle] = []
        self.waiting = Waiting()
        self.parameters = parameters
        self.masters = {name: self._master(parameter) for name, parameter in parameters.items()}
        self.collectors = {parameter: self.masters[name] for name, parameter in parameters.items()}
        groups = [
            {"params": [m for m in self.masters.values() if m.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [m for m in self.masters.values() if m.ndim < 2], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps
        )

    def _master(self, parameter: nn.Parameter) -> torch.Tensor:
        if parameter.dtype == torch.float32:
            return parameter
        master, waiting = parameter.detach().float().clone(), self.waiting  # not self: parameters would hold the optimizer

        def accumulate(p: torch.Tensor) -> None:
            if p.grad is None:  # torch also calls where backward gave none: it went to the collector
                return
            earlier, gradient, p.grad = waiting.gradients.pop(master, None), p.grad, None
            if waiting.wanted and earlier is None:
                waiting.gradients[master] = gradient
                return
            if earlier is not None:  # several backwards in one `deferring`: added in their order
                _add(master, earlier)
            _add(master, gradient)

        self.hooks.append(parameter.register_post_accumulate_grad_hook(accumulate))
        return master

    def release(self) -> None:
        """Lets go of the parameters: their gradients stay with them from here on, for another optimizer to take."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        self.collectors.clear()

    @contextmanager
    def deferring(
        self, places: Mapping[torch.Tensor, torch.Tensor] | None = None
    ) -> Iterator[dict[torch.Tensor, torch.Tensor]]:
        """Within it gradients are not added to the masters' as they come, but left to the caller to add, all at once.

        places: where `place` has the first gradient of a master put that goes to a `collector`, by master.

        Gives a dict that holds them by master, as backward made them, in the dtype of the parameter. There is none for a
        parameter that is its own master; what goes to a `collector` goes there at once, and comes before the parameter's own
        in a backward. Whatever is left in the dict at the end is dropped.
        """
        self.waiting.wanted, self.waiting.places = True, {} if places is None else places
        try:
            yield self.waiting.gradients
        finally:
            self.waiting.wanted, self.waiting.places = False, {}
            self.waiting.gradients.clear()

    def collector(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """The fp32 tensor whose `.grad` adds up this parameter's gradient; None for one that is not here, or once released.

        A backward that adds to that `.grad` itself must give autograd no gradient for the parameter, or it counts twice.
        """
        return self.collectors.get(parameter)

    def place(self, collector: torch.Tensor) -> torch.Tensor | None:
        """The tensor to write to if `collector` has no `.grad` yet, and to make its `.grad`; None: a new one."""
        return self.waiting.places.get(collector)

    def gradients(self) -> dict[str, torch.Tensor | None]:
        """fp32 gradients accumulated so far, by canonical name; None for a tensor that got none."""
        return {name: master.grad for name, master in self.masters.items()}

    def step(self, step: int) -> tuple[float, torch.Tensor]:
        """One update from the accumulated gradients, which it clears. Returns the rate and the norm before clipping."""
        rate = learning_rate(self.config, step, self.steps)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        masters = [master for master in self.masters.values() if master.grad is not None]
        limit = self.config.clip_norm if self.config.clip_norm > 0 else math.inf
        norm = torch.nn.utils.clip_grad_norm_(masters, limit)
        self.adamw.step()
        self.publish()
        self.zero_grad()
        return rate, norm

    @torch.no_grad()
    def publish(self) -> None:
        """Rounds the masters into the parameters that compute."""
        pairs = [(self.parameters[name], master) for name, master in self.masters.items()]
        copy_all((parameter, master) for parameter, master in pairs if parameter is not master)

    def zero_grad(self) -> None:
        for master in self.masters.values():
            master.grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """Masters, both moments and the step counts by name; copies nothing."""
        out = {}
        for name, master in self.masters.items():
            out[f"master.{name}"] = master.detach()
            for key, value in self.adamw.state.get(master, {}).items():
                out[f"{key}.{name}"] = value
        return out

    def moments(self, master: torch.Tensor) -> dict[str, torch.Tensor]:
        """AdamW's own state of a master, by the names in `MOMENTS`; from here on zeros where there was none yet."""
        own = self.adamw.state[master]
        if not own:
            on_device = any(group["capturable"] or group["fused"] for group in self.adamw.param_groups)
            step = torch.zeros((), device=master.device if on_device else "cpu")
            own |= {"step": step, "exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}
        return own

    @torch.no_grad()
    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Takes what `state` gave, into the tensors that are here already: a CUDA graph keeps their addresses.

        Moments that a state from before the first step lacks become zero, as they were then. Raises KeyError for a missing
        tensor, RuntimeError for a wrong shape; what came before it is loaded by then.
        """
        for name, master in self.masters.items():
            _copy(master, state[f"master.{name}"], f"master.{name}")
            given = any(f"{key}.{name}" in state for key in MOMENTS)
            own = self.moments(master) if given else self.adamw.state.get(master, {})
            for key in own:
                if given:
                    _copy(own[key], state[f"{key}.{name}"], f"{key}.{name}")
                else:
                    own[key].zero_()
        self.publish()


def copy_all(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copies each second tensor of a pair to the first, cast as `copy_` casts, in few launches.

    PyTorch makes one a pair if the targets or the sources of a list differ in dtype or device, or one pair in strides.
    """
    alike = defaultdict(list)
    for target, source in pairs:
        kind = target.dtype, source.dtype, target.device, source.device, target.stride() == source.stride()
        alike[kind].append((target, source))
    for some in alike.values():
        torch._foreach_copy_(*zip(*some, strict=True))


def _add(master: torch.Tensor, gradient: torch.Tensor) -> None:
    wide = gradient.float()
    master.grad = wide if master.grad is None else master.grad.add_(wide)


def _copy(target: torch.Tensor, source: torch.Tensor, name: str) -> None:
    if source.shape != target.shape:  # copy_ would spread it
        raise RuntimeError(f"{name} has shape {list(source.shape)}; {list(target.shape)} is expected")
    target.copy_(source)
