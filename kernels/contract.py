"""What an optimization is: data plus two functions.

Whatever drives a gate, a microbenchmark or a report is read from these dataclasses, so adding an optimization touches
one folder and no other file. Tolerances, iteration counts and skip lists are absent on purpose: the gate owns them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from loop.run import Run


class Exactness(Enum):
    """What the author of an optimization claims; the gate checks it."""

    BITWISE = "bitwise"  # same bits out
    ROUNDING = "rounding"  # same real-number function, other rounding or order of sums
    APPROX = "approx"  # another function: measured and reported, never called lossless


@dataclass(frozen=True)
class Needs:
    """Hardware and packages without which an optimization cannot run at all.

    cuda: needs a CUDA device. triton: has Triton kernels; on a box without a GPU they run in Triton's interpreter and
    are gated but not timed. capability: lowest and highest CUDA compute capability, inclusive. packages: import names.
    known_wrong(device): None, or in words which installed version is known to compute something wrong on this CUDA device.
    """

    cuda: bool = False
    triton: bool = False
    capability: tuple[tuple[int, int], tuple[int, int]] | None = None
    packages: tuple[str, ...] = ()
    known_wrong: Callable[[torch.device], str | None] | None = None


@dataclass(frozen=True)
class Workload:
    """One microbenchmark case. `shape` maps dimension names to sizes, e.g. {"T": 5376, "I": 6144}.

    beyond_int32: tensors of more than 2^31 elements, which 32-bit offsets can't reach. Only for an op that computes each row
    from the same row of its inputs: its result on the whole must have the bits of its result on parts. Such a case is not
    timed, nor compared with fp64; it runs on a GPU with enough memory (`abtest.huge`).
    """

    name: str
    shape: Mapping[str, int]
    dtype: str = "bfloat16"
    small: bool = False  # small enough for a CPU box and for Triton's interpreter
    beyond_int32: bool = False


@dataclass(frozen=True)
class Op:
    """The two sides of an optimization as functions of the same inputs.

    `inputs(workload, device, seed)` returns a tuple of tensors, nn.Modules, dataclasses (a batch, a pack) and plain values.
    `reference(*inputs)` and `candidate(*inputs)` return a tensor or a tuple of tensors. Gradients are compared for every
    floating-point tensor in `inputs` that requires one, a dataclass's fields included, and for every trainable parameter of
    a module in it.
    `bytes_moved(workload)` and `flops(workload)` are the least that forward plus backward must move and compute.
    `backward_stable`: the claim is that the result is that of inputs and incoming gradients which are off by no more than
    their own rounding; for a kernel that hands intermediates on in the inputs' precision where PyTorch would upcast. What
    such a rounding does to the exact result then counts as an error of the reference's. The definition is Higham's, Accuracy
    and Stability of Numerical Algorithms, section 1.5 (mixed forward-backward stability). Whole runs have no such allowance.
    """

    reference: Callable[..., Any]
    candidate: Callable[..., Any]
    inputs: Callable[[Workload, torch.device, int], tuple[Any, ...]]
    workloads: tuple[Workload, ...]
    bytes_moved: Callable[[Workload], int]
    flops: Callable[[Workload], int]
    backward_stable: bool = False


@dataclass(frozen=True)
class Fails:
    """Where a negative result breaks its claim, as the gate has said: compute dtypes, "bfloat16" for example.

    arm: of a whole run with it on. op: of its op alone, on every workload. It excuses nothing: the gates run all the same,
    and the tests ask for FAILED there and for the claim in every other dtype, so a negative result that passes is noticed.
    """

    arm: tuple[str, ...] = ()
    op: tuple[str, ...] = ()


@dataclass(frozen=True)
class Optimization:
    """One speed-up.

    eligible(run): None, or in words why this run can't have it. apply(run): changes `run.model` (modules swapped for
    modules), `run.loss_head`, `run.micro_step` or `run.optimizer`, and nothing else. `why_exact` names the argument for
    `exactness`, and for ROUNDING the operation whose rounding or order of summation changes. `fails`: only in
    `negative_results/`. `recipe`: what a run must be besides for there to be something to do, as a TOML recipe would say it.
    Stock of that recipe is then what it is compared with, so its speed is of no combination's and never ships. `in_update`:
    it works in the optimizer's update alone, which is no part of the micro-step that is timed.
    """

    name: str
    summary: str
    exactness: Exactness
    why_exact: str
    eligible: Callable[[Run], str | None]
    apply: Callable[[Run], None]
    op: Op | None = None
    needs: Needs = field(default_factory=Needs)
    conflicts: tuple[str, ...] = ()
    source: tuple[str, ...] = ()
    fails: Fails = field(default_factory=Fails)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    in_update: bool = False
