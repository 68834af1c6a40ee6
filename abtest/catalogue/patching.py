"""Small tools to plant with: swap one module, change one of its methods, bend a value or only its gradient."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from loop.batch import PackedBatch
from loop.run import Run


def names_of(model: nn.Module, *kinds: str) -> list[str]:
    """Names of the modules that have one of the class names `kinds` in their inheritance, in the model's order."""
    return [name for name, module in model.named_modules() if any(base.__name__ in kinds for base in type(module).__mro__)]


def named(model: nn.Module, *endings: str) -> list[str]:
    """Names of the modules whose name ends in one of `endings`, e.g. "mlp.up_proj", in the model's order."""
    return [name for name, _ in model.named_modules() if name.endswith(endings)]


def pick(names: Iterable[str], layer: str) -> str:
    """The first or the last of `names`."""
    return list(names)[0 if layer == "first" else -1]


def override(model: nn.Module, name: str, method: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Swaps the module `name` for one of a class of its own, with the same state, whose `method` is `make(original)`.

    `original` is the old module's bound method. Parameters, buffers and submodules stay the same objects.
    """
    old = model.get_submodule(name)
    replacement = make(getattr(old, method))
    kind = type(f"Planted{type(old).__name__}", (type(old),), {method: lambda self, *a, **k: replacement(*a, **k)})
    new = kind.__new__(kind)
    new.__dict__.update(old.__dict__)
    model.set_submodule(name, new)


def wrap_head(run: Run, make: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> None:
    """run.loss_head becomes `make(run.loss_head)`."""
    run.loss_head = make(run.loss_head)


def wrap_micro_step(run: Run, make: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> None:
    """run.micro_step becomes `make(run.micro_step)`."""
    run.micro_step = make(run.micro_step)


def swap_optimizer(run: Run, change: Callable[[type], type]) -> None:
    """A new optimizer of the class `change(old class)` over the same parameters and settings; one that stands around another
    (`kernels.fused_adamw`) is made anew around that very one."""
    old = run.optimizer
    if hasattr(old, "inner"):
        run.optimizer = change(type(old))(old.inner)
        return
    old.release()
    run.optimizer = change(type(old))(old.parameters, old.config, old.steps)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.change(gradient), None


def bend_gradient(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """x itself; its gradient goes through `change`."""
    return _Backward.apply(x, change)


def bend_output(model: nn.Module, name: str, change: Callable[..., Tensor]) -> None:
    """The module `name` returns `change(output, *inputs)`; `inputs` are the positional ones."""

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *inputs, **options: change(original(*inputs, **options), *inputs)

    override(model, name, "forward", make)


def on_rows(x: Tensor, fraction: float, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A copy of x in which `change` has replaced one row [n, D] in every 1 / fraction, the first row among them.

    A row is a vector of the last dimension, of a vector every element. Differentiable.
    """
    rows = x.reshape(-1, x.shape[-1] if x.ndim > 1 else 1)
    chosen = torch.arange(len(rows), device=x.device) % max(1, round(1 / fraction)) == 0
    return torch.where(chosen[:, None], change(rows), rows).view_as(x)


def every(fraction: float, count: int) -> bool:
    """Whether call number `count`, from 0, is one of `fraction` of all calls: the last of every 1 / fraction."""
    period = max(1, round(1 / fraction))
    return count % period == period - 1


def round_mantissa(x: Tensor, bits_lost: float) -> Tensor:
    """x with fewer of fp32's 23 mantissa bits, to nearest; 13 lost is TF32, 16 bf16, 20 fp8 E4M3, 21 fp8 E5M2.

    The range stays fp32's, as with a scale for every tensor. Its gradient is that of x.
    """
    mantissa, exponent = torch.frexp(x.detach().float())
    steps = 2.0 ** (24 - bits_lost)
    return torch.ldexp((mantissa * steps).round() / steps, exponent).to(x.dtype) + (x - x.detach())


def with_fields(batch: PackedBatch, **changes: Any) -> PackedBatch:
    """The batch with other tensors; document lengths stay known on the host unless given as `lengths`."""
    lengths = changes.pop("lengths", batch.lengths)
    changed = replace(batch, **changes)
    changed.__dict__["lengths"] = lengths
    return changed


def own_gradients(run: Run, work: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
    """What `work()` returns, and the fp32 gradients that it alone makes; those accumulated before are back in place."""
    masters = run.optimizer.masters
    before = {name: master.grad for name, master in masters.items()}
    run.optimizer.zero_grad()
    out = work()
    own = run.optimizer.gradients()
    for name, master in masters.items():
        master.grad = before[name]
    return out, own


def add_gradients(run: Run, gradients: dict[str, Tensor | None]) -> None:
    """Adds to what is accumulated, as one more micro-step would; copies, so that `gradients` stay as they are."""
    for name, gradient in gradients.items():
        master = run.optimizer.masters[name]
        if gradient is not None:
            master.grad = gradient.clone() if master.grad is None else master.grad.add_(gradient)


def matrices(run: Run) -> list[str]:
    """Names of the trained projections whose gradient is nowhere zero by construction, in the model's order."""
    masters = run.optimizer.masters
    return [n for n, m in masters.items() if ".layers." in n and "proj" in n and ".lora_A." not in n and m.ndim == 2]


def present(find: Callable[[nn.Module], list[str]], what: str) -> Callable[[Run], str | None]:
    """An `eligible`: None where `find(model)` finds something, else "the model has no `what`"."""
    return lambda run: None if find(run.model) else f"the model has no {what}"


def wide(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 where it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def parents_of(model: nn.Module, *children: str) -> list[str]:
    """Names of the modules that have every one of `children`, in the model's order."""
    return [name for name, module in model.named_modules() if all(hasattr(module, child) for child in children)]


def use_attention(run: Run, name: str, function: Callable[..., Any], masks: str | None) -> None:
    """Registers an attention function with transformers under `name`, and selects it for the run's model.

    masks: the attention implementation whose masks it gets; None for one that wants none.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(name, function)
    if masks in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[masks])
    run.model.set_attn_implementation(name)


def around_micro_step(run: Run, change: Callable[..., Tensor]) -> None:
    """A micro-step becomes `change(original, run, batch, step_supervised_tokens)`."""
    wrap_micro_step(run, lambda original: lambda *arguments: change(original, *arguments))


def copy_kept(run: Run, micro_steps: float) -> Callable[[Tensor], Tensor]:
    """A function that returns a detached copy of its argument as it was at the first of every `micro_steps` micro-steps.

    For one tensor. Recomputed activations see the same copy, since they belong to the same micro-step.
    """
    calls, kept = itertools.count(), []

    def micro_step(original: Callable[..., Tensor], *arguments: Any) -> Tensor:
        if next(calls) % int(micro_steps) == 0:
            kept.clear()
        return original(*arguments)

    def copy(tensor: Tensor) -> Tensor:
        if not kept:
            kept.append(tensor.detach().clone())
        return kept[0]

    around_micro_step(run, micro_step)
    return copy


def chosen(index: Any, fraction: float) -> Any:
    """Whether document or boundary number `index`, an int or a tensor, is one of `fraction` of all, from the middle on.

    Not the first: probes begin with documents of a token or two, in which little can go wrong.
    """
    period = max(1, round(1 / fraction))
    return index % period == period // 2


def value_with_gradient_of(value: Tensor, like: Tensor) -> Tensor:
    """The bits of `value`; backwards the gradient goes to `like` alone, which must be finite and of the same shape."""
    return value.detach() + (like - like.detach())


def with_parameters(model: nn.Module, name: str, **changes: Callable[[Tensor], Tensor]) -> None:
    """The module `name` computes with `change(parameter)` for each parameter named; "." in a name is written "__"."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        module, own = original.__self__, {key.replace("__", "."): change for key, change in changes.items()}

        def forward(*inputs: Any, **options: Any) -> Any:
            changed = {key: change(module.get_parameter(key)) for key, change in own.items()}
            return torch.func.functional_call(module, changed, inputs, options)

        return forward

    override(model, name, "forward", make)
