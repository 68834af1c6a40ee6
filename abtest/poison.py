"""Memory that nobody wrote, made visible: what `torch.empty` and its relatives hand out is filled with a value.

A kernel that reads what it never wrote is right by luck, since fresh memory is often zero. Three fillings tell: NaN spreads
through arithmetic, 1e4 survives a `nan_to_num`, and 0 is what the first run may have been given by chance.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

POISONS = (math.nan, 1e4, 0.0)
ENTRIES = (
    (torch, ("empty", "empty_like", "empty_strided", "empty_permuted")),
    (torch.Tensor, ("new_empty", "new_empty_strided")),
)
INTEGERS = {getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)}
LARGEST = 2**63 - 1  # that `fill_` takes, also for uint64


@contextmanager
def poisoned(value: float) -> Iterator[None]:
    """Inside, uninitialised tensors asked for from Python hold `value`, on every device.

    Floating-point types hold what is nearest to `value`, complex ones hold it in both parts, integers the nearest that
    fits (for NaN their largest value: an index far outside), booleans whether it is not 0, packed types all bits or none.

    The Python entry points are exchanged for all threads, so custom ops' implementations and backward threads see it, and
    nothing else of PyTorch changes: unlike its deterministic mode, this picks no other algorithms. Not reached: memory that
    PyTorch's C++ or torch.compile's code asks for itself, and a function that a module took out of torch by name before.
    """
    with torch.device("cpu"):
        torch.empty(0)  # has PyTorch look up its constructors for device contexts now: it remembers what it finds
    replaced = []
    try:
        for owner, names in ENTRIES:
            for name in names:
                if hasattr(owner, name):
                    replaced.append((owner, name, vars(owner).get(name)))
                    setattr(owner, name, _filling(getattr(owner, name), value))
        yield
    finally:
        for owner, name, original in reversed(replaced):
            if original is None:
                delattr(owner, name)  # it was inherited
            else:
                setattr(owner, name, original)


def _filling(original: Callable[..., torch.Tensor], value: float) -> Callable[..., torch.Tensor]:
    @functools.wraps(original, assigned=("__name__", "__doc__"))
    def allocate(*arguments, **keywords) -> torch.Tensor:
        made = original(*arguments, **keywords)
        if keywords.get("out") is None and made.layout is torch.strided:
            _fill(made, value)
        return made

    return allocate


@torch.no_grad()
def _fill(made: torch.Tensor, value: float) -> None:
    dtype = made.dtype
    if dtype.is_complex:
        made.fill_(complex(value, value))
    elif dtype == torch.bool:
        made.fill_(bool(value))
    elif dtype in INTEGERS:
        largest = min(torch.iinfo(dtype).max, LARGEST)
        made.fill_(largest if math.isnan(value) else max(torch.iinfo(dtype).min, min(int(value), largest)))
    elif dtype.is_floating_point and dtype is not getattr(torch, "float4_e2m1fn_x2", None):
        limits = torch.finfo(dtype)
        made.fill_(value if math.isnan(value) else max(limits.min, min(value, limits.max)))
    else:  # several values a byte: PyTorch has no arithmetic for them
        made.view(torch.uint8).fill_(0 if value == 0 else 255)
