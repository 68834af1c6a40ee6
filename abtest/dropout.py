"""Check 5, with dropout on: masks move on, follow the seed, and backward uses the one that forward drew.

The gate's oracle drops nothing out, since two implementations need not draw the same mask; so here an arm is only compared
with itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch.nn.functional import linear

from abtest import fingerprint as fp
from abtest.structure import Finding
from loop.batch import PackedBatch
from loop.config import Config
from loop.lora import Adapter, adapters
from loop.run import Run
from loop.training import accumulate

RATE = 0.25
STEP, TOLERANCE = 2**-10, 0.01  # of the finite difference; honest runs are off by 0.0005 at most
ADJOINT = 1e-4  # of |v| |J u|; rounding alone gives 1e-7
LINEAR = 1e-2  # f(x + u) + f(x - u) - 2 f(x), of f(x + u) - f(x), for what counts as linear
FILL = 0.5  # standard deviation of B times scaling and root of rank; B starts at zero and would hide all that A does, and
# at twice this the loss curves too much for a finite difference
MASKS, MEAN = 4, 0.1  # masks an adapter's mean is taken over, and how far it may be off: honest ones by 0.03 at most


def dropout_config(config: Config) -> Config:
    """The same run with dropout in its adapters."""
    return dataclasses.replace(config, lora=dataclasses.replace(config.lora, dropout=RATE))


def examine(run: Run, batch: PackedBatch, on_step: Callable[[int, int], None]) -> list[Finding]:
    """Findings about a run that was built with `dropout_config`. Derivatives need fp32; a bf16 run goes without."""
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
    found.append(adapters_mean(run, batch))
    if run.dtype == torch.float32:
        found += [_derivative(run, batch), adapters_adjoint(run, batch)]
    on_step(2, 2)
    return found


@torch.no_grad()
def _fill(run: Run) -> None:
    generator, lora = torch.Generator().manual_seed(0), run.config.lora
    size = FILL * math.sqrt(lora.rank) / (abs(lora.alpha) or 1.0)
    for name, parameter in run.optimizer.parameters.items():
        if ".lora_B." in name:
            drawn = size * torch.randn(parameter.shape, generator=generator)
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


def adapters_mean(run: Run, batch: PackedBatch) -> Finding:
    """Each adapter that the model calls, by itself: over masks, what it adds is on average what it adds without any.

    An arm is compared with itself alone where masks differ; this is what every implementation has in common.
    """
    shapes, worst, where = _called_adapters(run, batch), 0.0, ""
    scaling = run.config.lora.alpha / run.config.lora.rank
    for adapter in adapters(run.model):
        if adapter.name in shapes:
            share = _mean_share(adapter, scaling, shapes[adapter.name])
            if share is not None and not abs(share - 1) <= worst:
                worst, where = abs(share - 1), adapter.name
    detail = f"{where} is off by {worst:.2g}" if where else ""
    return Finding("dropout: on average nothing is lost", worst <= MEAN, detail)


@torch.no_grad()
def _mean_share(adapter: Adapter, scaling: float, shape: torch.Size) -> float | None:
    """The projection of `f(x) - base(x)` on `scaling * B A x` for random x, over masks; None where f is not linear."""
    generator = torch.Generator(adapter.a.device).manual_seed(7)
    x = torch.randn(shape, generator=generator, device=adapter.a.device).to(adapter.a.dtype)

    def forward(factor: float, seed: int = 0) -> torch.Tensor:
        torch.manual_seed(seed)
        return adapter.module(factor * x).float()

    base = linear(x, adapter.base.weight, adapter.base.bias).float()
    once, twice, none = forward(1.0), forward(2.0), forward(0.0)
    if once.shape != base.shape or float((twice + none - 2 * once).norm()) > LINEAR * float((once - none).norm()):
        return None
    whole = linear(linear(x, adapter.a), adapter.b).float() * scaling
    shares = [((forward(1.0, seed) - base) * whole).sum() / whole.square().sum() for seed in range(MASKS)]
    return float(torch.stack(shares).mean())


def adapters_adjoint(run: Run, batch: PackedBatch) -> Finding:
    """Each adapter that the model calls, by itself: <v, J u> = <J^T v, u> for its input, A and B, masks held by the seed.

    The slope of the whole loss hardly sees one adapter of many; this sees nothing else.
    """
    worst, where = 0.0, ""
    for name, shape in _called_adapters(run, batch).items():
        error, side = _adjoint_error(run.model.get_submodule(name), shape, run.device)
        if not error <= worst:
            worst, where = error, f"{name}, {side}"
    run.optimizer.zero_grad()
    detail = f"{where} is off by {worst:.2g}" if where else ""
    return Finding("dropout: each adapter's backward is the adjoint of its forward", worst <= ADJOINT, detail)


def _called_adapters(run: Run, batch: PackedBatch) -> dict[str, torch.Size]:
    """Modules with a LoRA pair of their own that a micro-step calls with one tensor, and that tensor's shape."""
    names = {name.partition(".lora_A.")[0] for name, _ in run.model.named_parameters() if ".lora_A." in name}
    shapes: dict[str, torch.Size] = {}
    handles = []
    for name in names:

        def seen(module, inputs, options, name=name):
            if len(inputs) == 1 and isinstance(inputs[0], torch.Tensor):
                shapes[name] = inputs[0].shape

        handles.append(run.model.get_submodule(name).register_forward_pre_hook(seen, with_kwargs=True))
    try:
        _loss(run, batch)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _adjoint_error(module: torch.nn.Module, shape: torch.Size, device: torch.device) -> tuple[float, str]:
    """The larger the more the module's backward differs from its forward's transpose; and for which of its arguments."""
    generator = torch.Generator(device).manual_seed(7)

    def drawn(like: torch.Size) -> torch.Tensor:
        return torch.randn(like, generator=generator, device=device)

    def forward(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return module(x)

    x = drawn(shape).requires_grad_()
    pairs = {name: p for name, p in module.named_parameters() if ".lora_" in f".{name}" and p.requires_grad}
    y = forward(x)
    v = drawn(y.shape)
    gradients = torch.autograd.grad(y, [x, *pairs.values()], v)
    worst, where = 0.0, ""
    with torch.no_grad():
        for name, argument, gradient in zip(("input", *pairs), (x, *pairs.values()), gradients, strict=True):
            u, before = drawn(argument.shape), argument.clone()
            changes = []
            for sign in (1, -1):
                argument.add_(u, alpha=sign)  # linear in each argument by itself, so the difference is the derivative
                changes.append(forward(x) - y)
                argument.copy_(before)
            change = changes[0]
            if float((change + changes[1]).norm()) > LINEAR * float(change.norm()):
                continue  # a module that does more than project has no adjoint to compare
            forwards, backwards = (v * change).double().sum(), (gradient * u).double().sum()
            error = abs(float(forwards - backwards)) / float(v.double().norm() * change.double().norm())
            if not error <= worst:
                worst, where = error, name
    return worst, where


@torch.no_grad()
def _move(run: Run, gradients: dict[str, torch.Tensor], by: float) -> None:
    for name, gradient in gradients.items():
        run.optimizer.parameters[name].add_(gradient, alpha=by)
