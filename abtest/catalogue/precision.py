"""Defects of precision, of the optimizer, and of what autotuning does to kernels that work in place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from abtest.catalogue.patching import (
    around_micro_step,
    bend_output,
    matrices,
    named,
    on_rows,
    override,
    pick,
    swap_optimizer,
)
from abtest.catalogue.patching import round_mantissa as rounded
from abtest.catalogue.planted import Planted
from loop.optim import MasterAdamW, learning_rate
from loop.run import Run

WHOLE = ("all",)
Step = Callable[[int], tuple[float, Tensor]]


def around_step(run: Run, change: Callable[[MasterAdamW, Step, int], tuple[float, Tensor]]) -> None:
    """The optimizer's `step(step)` becomes `change(optimizer, original step, step)`."""

    def subclass(kind: type) -> type:
        class Changed(kind):
            def step(self, step: int) -> tuple[float, Tensor]:
                return change(self, super().step, step)

        return Changed

    swap_optimizer(run, subclass)


def with_settings(run: Run, **settings: float) -> None:
    """The optimizer steps with other settings than it was given, and restores them."""

    def change(optimizer: MasterAdamW, original: Step, step: int) -> tuple[float, Tensor]:
        kept, optimizer.config = optimizer.config, dataclasses.replace(optimizer.config, **settings)
        out = original(step)
        optimizer.config = kept
        return out

    around_step(run, change)


def with_groups(run: Run, change: Callable[[dict], None]) -> None:
    """Every parameter group of a new optimizer goes through `change`."""
    swap_optimizer(run, lambda kind: type(f"Changed{kind.__name__}", (kind,), {}))
    for group in run.optimizer.adamw.param_groups:
        change(group)


# Precision.


def accumulated_in_fewer_bits(run: Run, layer: str, bits_lost: float) -> None:
    def micro_step(original: Callable[..., Tensor], *arguments) -> Tensor:
        loss = original(*arguments)
        for gradient in run.optimizer.gradients().values():
            if gradient is not None:
                gradient.copy_(rounded(gradient, bits_lost))
        return loss

    around_micro_step(run, micro_step)


def masters_rounded(run: Run, layer: str, bits_lost: float) -> None:
    """Small updates vanish: what a step adds is rounded away."""

    def change(optimizer: MasterAdamW, original: Step, step: int) -> tuple[float, Tensor]:
        out = original(step)
        with torch.no_grad():
            for master in optimizer.masters.values():
                master.copy_(rounded(master, bits_lost))
        optimizer.publish()
        return out

    around_step(run, change)


def moments_rounded(run: Run, layer: str, bits_lost: float) -> None:
    def change(optimizer: MasterAdamW, original: Step, step: int) -> tuple[float, Tensor]:
        out = original(step)
        for state in optimizer.adamw.state.values():
            for key in ("exp_avg", "exp_avg_sq"):
                state[key].copy_(rounded(state[key], bits_lost))
        return out

    around_step(run, change)


def operands_rounded(run: Run, layer: str, bits_lost: float) -> None:
    """A down projection's input loses mantissa bits on its way in."""

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x: original(rounded(x, bits_lost))

    override(run.model, pick(_down_projections(run.model), layer), "forward", make)


def _down_projections(model: nn.Module) -> list[str]:
    return named(model, ".down_proj")


def added_twice(run: Run, layer: str, fraction: float) -> None:
    """An in-place add ran twice while it was tuned: some positions have the MLP's output twice."""
    name = pick(named(run.model, ".mlp"), layer)
    bend_output(run.model, name, lambda out, x: on_rows(out, fraction, lambda rows: 2 * rows))


# The optimizer.


def clip_too_high(run: Run, layer: str, factor: float) -> None:
    with_settings(run, clip_norm=run.optimizer.config.clip_norm * factor)


def clipped_by_tensor(run: Run, layer: str, fraction: float) -> None:
    """A fraction of the tensors is clipped each on its own, before all are clipped together."""

    def change(optimizer: MasterAdamW, original: Step, step: int) -> tuple[float, Tensor]:
        masters = [master for master in optimizer.masters.values() if master.grad is not None]
        norm = torch.nn.utils.get_total_norm([master.grad for master in masters])
        share = optimizer.config.clip_norm / math.sqrt(max(len(masters), 1))
        for master in masters[:: max(1, round(1 / fraction))]:
            torch.nn.utils.clip_grad_norm_([master], share)
        return original(step)[0], norm

    around_step(run, change)


def decay_dropped(run: Run, layer: str, part: float) -> None:
    with_groups(run, lambda group: group.update(weight_decay=group["weight_decay"] * (1 - part)))


def decay_of_vectors(run: Run, layer: str, part: float) -> None:
    """Norms, biases and decay rates are decayed too."""

    def change(group: dict) -> None:
        if group["weight_decay"] == 0:
            group["weight_decay"] = part * run.optimizer.config.weight_decay

    with_groups(run, change)


def decay_coupled(run: Run, layer: str, part: float) -> None:
    """Part of the decay goes through the gradient, as L2 regularisation."""
    decay = run.optimizer.config.weight_decay

    def change(optimizer: MasterAdamW, original: Step, step: int) -> tuple[float, Tensor]:
        for master in optimizer.masters.values():
            if master.grad is not None and master.ndim >= 2:
                master.grad.add_(master.detach(), alpha=part * decay)
        return original(step)

    around_step(run, change)
    for group in run.optimizer.adamw.param_groups:
        group["weight_decay"] *= 1 - part


def bias_correction_off(run: Run, layer: str, steps: float) -> None:
    """Both moments are corrected as if so many more steps had been taken."""

    def change(optimizer: MasterAdamW, original: Step, step: int) -> tuple[float, Tensor]:
        _start_state(optimizer)
        for state in optimizer.adamw.state.values():
            state["step"] += steps
        out = original(step)
        for state in optimizer.adamw.state.values():
            state["step"] -= steps
        return out

    around_step(run, change)


def _start_state(optimizer: MasterAdamW) -> None:
    """What torch's AdamW makes at a tensor's first step, now."""
    for group in optimizer.adamw.param_groups:
        for master in group["params"]:
            if master.grad is not None and not optimizer.adamw.state[master]:
                device = master.device if group["fused"] or group["capturable"] else "cpu"
                zeros = {key: torch.zeros_like(master.detach()) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.adamw.state[master] = {"step": torch.zeros((), device=device), **zeros}


def eps_too_large(run: Run, layer: str, eps: float) -> None:
    with_groups(run, lambda group: group.update(eps=eps))


def beta2_off(run: Run, layer: str, less: float) -> None:
    with_groups(run, lambda group: group.update(betas=(group["betas"][0], group["betas"][1] - less)))


def rate_ahead(run: Run, layer: str, steps: float) -> None:
    """A later step's rate, under the name of this one's."""

    def change(optimizer: MasterAdamW, original: Step, step: int) -> tuple[float, Tensor]:
        return learning_rate(optimizer.config, step, optimizer.steps), original(step + int(steps))[1]

    around_step(run, change)


def warm_up_short(run: Run, layer: str, part: float) -> None:
    warmup = run.optimizer.config.warmup_steps
    with_settings(run, warmup_steps=warmup - max(1, round(part * warmup)))


def update_withheld(run: Run, layer: str, part: float) -> None:
    """One tensor gets only part of its updates, or none."""
    name = pick(matrices(run), layer)

    def change(optimizer: MasterAdamW, original: Step, step: int) -> tuple[float, Tensor]:
        master = optimizer.masters[name]
        before = master.detach().clone()
        out = original(step)
        with torch.no_grad():
            master.lerp_(before, part)
        optimizer.publish()
        return out

    around_step(run, change)


def norm_misreported(run: Run, layer: str, error: float) -> None:
    def change(optimizer: MasterAdamW, original: Step, step: int) -> tuple[float, Tensor]:
        rate, norm = original(step)
        return rate, norm * (1 + error)

    around_step(run, change)


def _setting(name: str) -> Callable[[Run], str | None]:
    return lambda run: None if getattr(run.config.optim, name) > 0 else f"optim.{name} is 0"


_mutant = partial(Planted, family="precision_optimizer", kind="mutant")
_whole = partial(_mutant, layers=WHOLE)
_decay = partial(_whole, magnitudes=(0.1, 1.0), eligible=_setting("weight_decay"))

PLANTED = (
    _whole("accumulated_in_fewer_bits", summary="gradients accumulated in bf16 or fp8", modelled_on="Liger 830",
           plant=accumulated_in_fewer_bits, magnitudes=(16, 20), unit="mantissa bits lost"),
    _whole("masters_rounded", summary="master weights kept in TF32 or bf16", modelled_on="torchao 1124",
           plant=masters_rounded, magnitudes=(13, 16), unit="mantissa bits lost"),
    _whole("moments_rounded", summary="AdamW's moments kept in bf16 or fp8", modelled_on="torchao 1124",
           plant=moments_rounded, magnitudes=(16, 20), unit="mantissa bits lost"),
    _mutant("fp8_input", summary="a projection's input in fp8", modelled_on="TransformerEngine 1190, torchao 4652",
            plant=operands_rounded, magnitudes=(20, 21), unit="mantissa bits lost"),
    _mutant("tf32_input", summary="a projection's input in TF32 or bf16", modelled_on="transformers 48428 (TF32)",
            plant=operands_rounded, magnitudes=(13, 16), unit="mantissa bits lost",
            eligible=lambda run: None if run.dtype == torch.float32 else "the run computes in bf16 already"),
    _mutant("added_twice", summary="tuning ran an in-place add twice", modelled_on="triton 6547", plant=added_twice,
            magnitudes=(0.02, 0.25), unit="fraction of positions"),
    _whole("clip_too_high", summary="clipping above the limit, or none", modelled_on="DeepSpeed 3790", plant=clip_too_high,
           magnitudes=(1.1, 1e6), unit="times the limit", eligible=_setting("clip_norm")),
    _whole("clipped_by_tensor", summary="tensors clipped one by one", modelled_on="DeepSpeed 3790", plant=clipped_by_tensor,
           magnitudes=(0.25, 1.0), unit="fraction of tensors", eligible=_setting("clip_norm")),
    _decay("decay_dropped", summary="weight decay too small or missing", modelled_on="torchao 1124 (updates that vanish)",
           plant=decay_dropped, unit="part of the decay"),
    _decay("decay_of_vectors", summary="norms and decay rates decayed", modelled_on="FLA 754 (A_log overwritten)",
           plant=decay_of_vectors, unit="of the matrices' decay", methods=("full",)),
    _decay("decay_coupled", summary="decay through the gradient instead of the weight",
           modelled_on="DeepSpeed 3790 (a setting that one code path ignores)", plant=decay_coupled,
           unit="part of the decay"),
    _whole("bias_correction_off", summary="moments corrected for another step count",
           modelled_on="DeepSpeed 3790 (optimizer state out of step)", plant=bias_correction_off,
           magnitudes=(1, 10), unit="steps ahead"),
    _whole("adam_eps_too_large", summary="eps of AdamW inside the root, in effect",
           modelled_on="torchao 1124 (small updates vanish)", plant=eps_too_large,
           magnitudes=(1e-6, 1e-4), unit="eps"),
    _whole("beta2_off", summary="AdamW with another beta2", modelled_on="DeepSpeed 3790 (a setting ignored)",
           plant=beta2_off, magnitudes=(0.001, 0.049), unit="less than configured"),
    _whole("rate_ahead", summary="the learning rate of a later step", modelled_on="pytorch 84614 (state frozen at capture)",
           plant=rate_ahead, magnitudes=(1, 3), unit="steps ahead"),
    _whole("warm_up_short", summary="warm-up cut short or left out", modelled_on="DeepSpeed 3790 (a setting ignored)",
           plant=warm_up_short, magnitudes=(0.3, 1.0), unit="part of the warm-up", eligible=_setting("warmup_steps")),
    _mutant("update_withheld", summary="one tensor not updated, or in part", modelled_on="torchao 1124",
            plant=update_withheld, magnitudes=(0.1, 1.0), unit="part of the update"),
    _whole("norm_misreported", summary="the gradient norm that is logged is wrong", modelled_on="DeepSpeed 3790",
           plant=norm_misreported, magnitudes=(0.01, 1.0), unit="relative error"),
)  # fmt: skip
