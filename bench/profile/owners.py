"""Which optimization a kernel or an operator belongs to, read from the folders' sources.

Folders may name their kernels alike (`_forward_kernel`). Then the operator that launched one tells, and within a CUDA graph,
which no operator launches, what was learned from the same kernels launched one by one.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from bench.cross_compile.folders import folders, is_jitted
from bench.profile.trace import Event, Trace

OPERATOR = re.compile(r"isoloss::\w+")
BOUNDS = re.compile(r"__launch_bounds__\([^)]*\)")
CUDA_KERNEL = re.compile(r"__global__\s+(?:\w+\s+)*(\w+)\s*\(")


def kernels_in(folder: Path) -> set[str]:
    """Names of a folder's kernels: functions jitted by Triton, helpers among them, and `__global__` ones of CUDA sources."""
    found = set()
    for path in folder.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and is_jitted(node)}
    for path in folder.rglob("*.cu"):
        found |= set(CUDA_KERNEL.findall(BOUNDS.sub("", path.read_text(encoding="utf-8"))))
    return found


def operators_in(folder: Path) -> set[str]:
    """Names of the operators that a folder defines, "isoloss::silu_mul" for example, by the texts that name them."""
    found = set()
    for path in folder.rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        found |= {text for text in texts if OPERATOR.fullmatch(text)}
    return found


def own_name(kernel: str) -> str:
    """A kernel's name without its result type, unnamed name space, template and parameters: Triton's as it is."""
    return re.match(r"(?:void )?(?:\(anonymous namespace\)::)?([\w:]*)", kernel).group(1)


class Owners:
    """The optimizations `names`, by what they run."""

    def __init__(self, names: Iterable[str]) -> None:
        self.kernels: dict[str, set[str]] = defaultdict(set)
        self.operators: dict[str, str] = {}
        self.learned: dict[tuple[str, ...], set[str]] = defaultdict(set)
        known = folders()
        for name in names:
            path = known[name][1]
            for kernel in kernels_in(path):
                self.kernels[kernel].add(name)
            self.operators |= {operator: name for operator in operators_in(path)}

    def learn(self, trace: Trace) -> None:
        """From a trace in which operators launched everything one by one."""
        launchers = launchers_of(trace)
        for event in trace.device:
            owner = self.operators.get(launchers.get(event.external, ""))
            if owner in self.kernels.get(own_name(event.name), ()):
                self.learned[event.signature].add(owner)

    def of(self, kernel: Event, operator: str | None = None) -> str | None:
        """The optimization that `kernel`, launched by `operator`, belongs to; None where it is a library's. Where nothing
        tells apart several that name it alike, all of them: "rms_norm or silu_mul"."""
        candidates = self.kernels.get(own_name(kernel.name), set())
        if len(candidates) > 1:
            launched_by = {self.operators.get(operator or "")}
            candidates = candidates & launched_by or candidates & self.learned.get(kernel.signature, set()) or candidates
        return " or ".join(sorted(candidates)) or None


def launchers_of(trace: Trace) -> dict[int | None, str]:
    """The name of each operator by the number that it shares with what it launched."""
    return {event.external: event.name for event in trace.operators if event.external is not None}
