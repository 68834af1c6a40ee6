"""The tripwire: bend what an optimization computes, and see whether the gate turns red.

A candidate whose work is thrown away, or that is never reached, passes every comparison with the reference; so what it puts
out is made wrong on purpose, and a gate that stays green has compared something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from abtest.gate import gradient_checks
from abtest.gradients import Distances, compare
from loop.run import Run

# Exact in every dtype, and far above any limit wherever it is done. A sixteenth was not: in half of the columns of one late
# layer, with a norm behind it, it moves gradients by 3 %, and those of bf16 at 2B are 7 to 8 % from the oracle's anyway.
BEND = 1 + 2**-1


def parts(run: Run) -> dict[str, tuple[object, ...]]:
    """Everything an optimization may exchange: modules by name, and the other seams. Compare with `is`, not by value.

    What is held can't be freed, so nothing new can come to lie at its address and pass for it.
    """
    found: dict[str, tuple[object, ...]] = {}
    for name, module in run.model.named_modules():
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        found[name] = (module, type(module), vars(module).get("forward"), *hooks)
        if name.endswith("self_attn"):  # which attention function it calls is a setting of the model, not a module
            found[name] += (run.model.config._attn_implementation,)
    return found | {f"run.{seam}": (getattr(run, seam),) for seam in ("loss_head", "micro_step", "optimizer")}


def exchanged(before: dict[str, tuple[object, ...]], run: Run) -> list[str]:
    """What is another object than `before`: seams, and modules without those inside another exchanged one."""
    changed = [name for name, now in parts(run).items() if not _same(before.get(name, ()), now)]
    return [name for name in changed if not any(name.startswith(f"{other}.") for other in changed if other != name)]


def _same(one: tuple[object, ...], other: tuple[object, ...]) -> bool:
    return len(one) == len(other) and all(a is b or (isinstance(a, str) and a == b) for a, b in zip(one, other, strict=True))


@contextmanager
def bent(run: Run, names: list[str]) -> Iterator[list[str]]:
    """Inside, the output of the named modules, and of an exchanged loss head, is bent. Yields which."""
    with ExitStack() as stack:
        bending = []
        for name in names:
            if name == "run.loss_head":
                _bend_head(run, stack)
            elif name.startswith("run.") or not name:
                continue
            else:
                _bend_module(run.model.get_submodule(name), stack)
            bending.append(name)
        yield bending


def _bend_module(module: nn.Module, stack: ExitStack) -> None:
    """Its hooks in a dictionary of their own: one made from the module that it stands in for has that one's, and where
    the old module is the one that is called, bending it would hide that."""
    before = module._forward_hooks
    module._forward_hooks = before.copy()
    stack.callback(setattr, module, "_forward_hooks", before)
    module.register_forward_hook(_bend)


def _bend(module: nn.Module, arguments: object, output):
    if isinstance(output, tuple):
        return (_bend_tensors(output[0]), *output[1:])
    return _bend_tensors(output)


def _bend_head(run: Run, stack: ExitStack) -> None:
    head = run.loss_head
    run.loss_head = lambda model, hidden, batch: head(model, hidden, batch) * BEND
    stack.callback(setattr, run, "loss_head", head)


class BentOperator(TorchDispatchMode):
    """Inside, every floating-point tensor that one operator, by its schema's name, returns or writes to is bent.

    `hits` counts the calls in which there was such a tensor: one that makes indices alone can't be bent.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.hits = name, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if function._schema.name != self.name:
            return out
        written = [tensor for tensor in _written(function._schema, args, kwargs) if _bendable(tensor)]
        for tensor in written:
            tensor.copy_(_bend_tensors(tensor))
        returned = [value for value in (out if isinstance(out, tuple | list) else (out,)) if _bendable(value)]
        self.hits += bool(written or returned)
        return out if any(value is tensor for value in returned for tensor in written) else _bend_tensors(out)


def _written(schema: torch.FunctionSchema, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operator's schema says it writes to."""
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    return [given[a.name] for a in schema.arguments if a.alias_info and a.alias_info.is_write and a.name in given]


def _bendable(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _bend_tensors(value):
    """Every second column `BEND` times what it is: a norm behind it would take the same factor for all out again."""
    if _bendable(value):
        if value.ndim == 0 or value.shape[-1] == 1:
            return value * BEND
        columns = torch.ones(value.shape[-1], dtype=value.dtype, device=value.device)
        columns[::2] = BEND
        return value * columns
    if isinstance(value, tuple | list):
        return type(value)(_bend_tensors(item) for item in value)
    return value


def read_distances(answer: dict) -> Distances:
    rows = load_file(answer["rows"])
    return Distances(answer["error"], answer["norm"], answer["dot"], rows, answer["elements"], answer["problems"])


def read_tripwire(state: str, reference: dict, answer: dict, elements: dict[str, int]) -> dict[str, Any]:
    """Whether bending the arm's own parts would be noticed; `reference`: its gradients of the same state, more probes."""
    if answer["unreached"]:
        return {"red": False, "detail": f"{answer['unreached'][0]} runs, but changing its result changes nothing"}
    if not answer["bent"]:
        return {"red": True, "detail": "it exchanged no module and no loss head, so there was nothing to bend"}
    if answer["problems"]:
        return {"red": True, "detail": answer["problems"][0]}
    bent = read_distances(answer)
    count = len(next(iter(bent.error.values())))
    first = {part: {name: values[:count] for name, values in reference[part].items()} for part in ("error", "norm", "dot")}
    own = Distances(first["error"], first["norm"], first["dot"], bent.rows, bent.elements, [])
    checks = gradient_checks(state, compare(own, bent, elements))
    red = [check for check in checks if not check.passed]
    words = f"{red[0].name} {red[0].value:.3g}" if red else "its gradients stay within every limit"
    return {"red": bool(red), "detail": f"with {len(answer['bent'])} of its parts bent, first {answer['bent'][0]}: {words}"}
