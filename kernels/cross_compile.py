"""What an optimization says about cross-compiling its kernels: for which GPUs, and what must come out.

A folder with kernels has a module `cross_compile` with a tuple `CASES` of `CompileCase` (a Triton kernel) and `CudaCase` (a
kernel of a .cu file). `python -m bench.cross_compile` finds the module, compiles each case for each of its targets, and
publishes what came out beside what was expected. No GPU is needed, and nothing is run.

Only that command imports a folder's `cross_compile`, in a process where Triton compiles. So such a module may import triton;
this one does not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triton import JITFunction

# The most shared memory, in bytes, that one block can have: CUDA C++ Programming Guide, technical specifications.
SHARED_BYTES = {"sm_80": 166_912, "sm_90a": 232_448, "sm_120a": 101_376, "sm_121a": 101_376}
TARGETS = tuple(SHARED_BYTES)
CODES = ("ptx", "sass")


@dataclass(frozen=True)
class Instruction:
    """An instruction that the code for some targets must hold, or must not.

    pattern: a regular expression, searched in every line of `code` that is an instruction: PTX, or SASS where what counts is
    what ptxas made of it. The lines with a match must be at least `least` and at most `most`; 0 and 0 forbid it.
    """

    name: str  # as the report calls it, "mma.sync"
    pattern: str
    targets: tuple[str, ...] = TARGETS
    code: str = "ptx"
    least: int = 1
    most: int | None = None

    def __post_init__(self):
        _known_targets(self.name, self.targets)
        if self.code not in CODES:
            raise ValueError(f"{self.name}: code is {self.code!r}, not one of {', '.join(CODES)}")
        re.compile(self.pattern)


@dataclass(frozen=True)
class Expected:
    """What must come out for every target.

    registers: at most, a thread. spill_bytes: at most, stack and local memory of a thread. shared_bytes: at most, a block;
    None for what the target has, which nothing may exceed. narrow_accesses: at most so many loads and stores of global
    memory that move less than 16 bytes a thread; None where narrow ones are right.
    """

    registers: int
    spill_bytes: int = 0
    shared_bytes: int | None = None
    narrow_accesses: int | None = None
    instructions: tuple[Instruction, ...] = ()


@dataclass(frozen=True)
class CompileCase:
    """A Triton kernel as one launch would compile it.

    kernel: the jitted function; an autotuned one stands for the function that it tunes. signature: Triton's type of every
    argument that is no constexpr, "*bf16" for a pointer and "i32" for an integer. constexprs: the value of every other.
    multiples_of_16: integers that Triton may take to be divisible by 16, as it would find at a launch; pointers are taken to
    be aligned to 16 bytes, as PyTorch's are. options: what the launch passes besides arguments, such as num_warps.
    """

    name: str  # unique in the folder
    kernel: JITFunction
    signature: Mapping[str, str]
    expected: Expected
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    multiples_of_16: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self):
        _known_targets(self.name, self.targets)


@dataclass(frozen=True)
class CudaCase:
    """A kernel in CUDA C++, compiled by nvcc; where there is no nvcc, the report says that it was not compiled.

    kernel: a part of its name that no other kernel of the file has; C++ names are mangled, templates' arguments with them.
    flags: nvcc's, besides the target. dynamic_shared_bytes: what the launch asks for, besides what the code declares.
    """

    name: str  # unique in the folder
    source: Path
    kernel: str
    expected: Expected
    flags: tuple[str, ...] = ()
    dynamic_shared_bytes: int = 0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self):
        _known_targets(self.name, self.targets)


def _known_targets(name: str, targets: tuple[str, ...]) -> None:
    unknown = [target for target in targets if target not in TARGETS]
    if unknown or not targets:
        raise ValueError(f"{name}: targets are {targets}; one or more of {', '.join(TARGETS)} are expected")
