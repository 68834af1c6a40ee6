"""The process that compiles, started by `run`: `python -m bench.cross_compile.worker SCRATCH [NAME ...]`.

First it writes SCRATCH/plan.jsonl, an outcome without result for every case and target; then, to SCRATCH/outcomes.jsonl, a
line as each is compiled. Lines that are there already are not done again, so that a process whose compiler died can be
followed by another.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from abtest import jsonl
from bench.cross_compile.folders import declaring
from bench.cross_compile.records import LIMITS, Count, Outcome, order
from kernels.cross_compile import SHARED_BYTES, CompileCase, CudaCase
from loop.cli import guarded
from loop.errors import UserError
from loop.files import write_text

BROKEN = (AttributeError, ImportError, KeyError, NameError, SyntaxError, TypeError, ValueError)  # what an import may raise
LONGEST_ERROR = 300  # characters


def main() -> None:
    scratch, names = Path(sys.argv[1]), sys.argv[2:]
    try:
        import triton
    except ImportError as error:
        raise UserError(f"kernels are cross-compiled by Triton, which can't be imported here: {error}") from error
    jobs = sorted(planned(names), key=lambda job: order(job[0]))
    write_text(scratch / "plan.jsonl", "".join(jsonl.dumps(outcome) + "\n" for outcome, _ in jobs))
    results = scratch / "outcomes.jsonl"
    done = len(results.read_text(encoding="utf-8").splitlines()) if results.exists() else 0
    failures = (triton.TritonError, RuntimeError, ValueError, subprocess.CalledProcessError)
    for outcome, case in jobs[done:]:
        try:
            outcome = compiled(outcome, case, scratch)
        except failures as error:
            outcome = dataclasses.replace(outcome, error=in_one_line(error))
        jsonl.append(results, jsonl.dumps(outcome))


def planned(names: list[str]) -> list[tuple[Outcome, CompileCase | CudaCase]]:
    """Every case and target of the named optimizations, or of all. Raises UserError for a folder whose cases are wrong."""
    jobs = []
    for name, module in declaring().items():
        if names and name not in names:
            continue
        try:
            cases = importlib.import_module(module).CASES
            kernels = [_kernel(case) for case in cases]
        except BROKEN as error:
            raise UserError(f"{module}: {in_one_line(error)}") from error
        titles = [case.name for case in cases]
        if len(set(titles)) < len(titles) or not titles:
            raise UserError(f"{module}: CASES needs a case, and every case a name of its own; there are: {titles}")
        for case, kernel in zip(cases, kernels, strict=True):
            jobs += [(Outcome(name, kernel, case.name, target, _launch(case), _limits(case, target)), case)
                     for target in case.targets]  # fmt: skip
    return jobs


def _kernel(case: CompileCase | CudaCase) -> str:
    from bench.cross_compile.compilers import jitted

    if isinstance(case, CudaCase):
        return f"{case.source.name}: {case.kernel}"
    function = jitted(case.kernel)
    return f"{function.__module__}.{function.__name__}"


def _launch(case: CompileCase | CudaCase) -> dict[str, str]:
    if isinstance(case, CudaCase):
        return {"flags": " ".join(case.flags)}
    sixteen = {name: ", a multiple of 16" for name in case.multiples_of_16}
    types = {name: f"{kind}{sixteen.get(name, '')}" for name, kind in case.signature.items()}
    return types | {name: str(value) for name, value in {**case.constexprs, **case.options}.items()}


def _limits(case: CompileCase | CudaCase, target: str) -> dict[str, int | None]:
    limits = {name: getattr(case.expected, name) for name in LIMITS}
    most = SHARED_BYTES[target]
    return limits | {"shared_bytes": most if limits["shared_bytes"] is None else min(most, limits["shared_bytes"])}


def compiled(outcome: Outcome, case: CompileCase | CudaCase, scratch: Path) -> Outcome:
    """`outcome` with what the case compiles to. Raises what `bench.cross_compile.compilers` does."""
    from bench.cross_compile import binary, compilers

    target = outcome.target
    if isinstance(case, CompileCase):
        code = compilers.with_triton(case, target, scratch)
    elif compilers.nvcc() is None:
        return dataclasses.replace(outcome, skipped="nvcc is not installed here")
    else:
        code = compilers.with_nvcc(case, target, scratch)
    cubin = scratch / "kernel.cubin"
    cubin.write_bytes(code.cubin)
    measured = binary.resources(cubin, code.entry, compilers.capability(target))
    lines = {"ptx": binary.ptx_instructions(code.ptx)}
    asked = [instruction for instruction in case.expected.instructions if target in instruction.targets]
    if any(instruction.code == "sass" for instruction in asked):
        lines["sass"] = binary.sass_instructions(cubin, code.entry)
    measured["shared_bytes"] += code.dynamic_shared_bytes
    return dataclasses.replace(
        outcome,
        measured=measured | binary.accesses(lines["ptx"]),
        instructions=tuple(_counted(instruction, lines[instruction.code]) for instruction in asked),
        compiled_for=code.compiled_for,
        compilers=code.compilers,
    )


def _counted(asked: Any, lines: list[str]) -> Count:
    found = sum(re.search(asked.pattern, line) is not None for line in lines)
    return Count(asked.name, asked.code, asked.pattern, found, asked.least, asked.most)


def in_one_line(error: BaseException) -> str:
    """What went wrong, without temporary names, so that the record is the same every time."""
    text = re.sub(r"\S*/tmp\w+\.(?=ptx|o\b)", "kernel.", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text}"[:LONGEST_ERROR]


if __name__ == "__main__":
    guarded(main)
