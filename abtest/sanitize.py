"""`python -m abtest.sanitize`: compute-sanitizer over every kernel's small cases, and what else only a GPU can show.

For each optimization: 20 repeats of its op with the same bits, memcheck (out of bounds), initcheck (reads of memory that
nobody wrote) and racecheck (shared memory), and its case beyond 2^31 elements. Ends with 0 when all is well, 1 when
something is wrong, 2 for a mistake, such as a machine without compute-sanitizer or GPU.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from abtest.verdict import Check
from kernels import registry
from kernels.contract import Optimization
from loop.cli import guarded, parse
from loop.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "initcheck", "racecheck")
REPEATS = 20
BEYOND = "beyond 2^31 elements"
TIMEOUT = 1200  # seconds a process; instrumented kernels are slower by tens of times
USUAL_PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")

# Each tensor an allocation of its own, whose ends and whose writes the tools then see; and kernels that were tuned in the
# run before are not tuned again while instrumented.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_CACHE_AUTOTUNING": "1"}

SUMMARY = re.compile(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (.*)$", re.MULTILINE)
COUNTS = re.compile(r"(\d+) (?:error|warning)s?")
TEMPLATE = re.compile(r"\bat::native::(?:<unnamed>::|\(anonymous namespace\)::)?(\w+)<")  # of one of PyTorch's kernels
PLACE = re.compile(r"\bat (?:0x[0-9a-f]+ in )?(.+?)\+0x[0-9a-f]+")


@dataclass(frozen=True)
class Command:
    """Flags of `python -m abtest.sanitize`."""

    optimization: tuple[str, ...] = ()  # names of folders in kernels/ or negative_results/; none: all of them
    repeats: int = REPEATS  # runs of each case that must have the same bits


def main(argv: list[str] | None = None) -> int:
    command = parse(Command(), "python -m abtest.sanitize", "Runs compute-sanitizer over kernels' small cases.", argv)
    if command.repeats < 2:
        raise UserError(f"--repeats {command.repeats}: at least 2 are needed to compare")
    chosen = registry.select(command.optimization or registry.discover())
    find_sanitizer()
    console, wrong = Console(), 0
    table = Table("optimization", "check", "result", "detail", title="compute-sanitizer")
    for optimization in chosen:
        reason = cannot(optimization)
        if reason:
            table.add_row(optimization.name, "", "not run", escape(reason))
            continue
        beyond, not_run = beyond_int32(optimization)
        for check in sanitize(optimization, repeats=command.repeats) + beyond:
            wrong += not check.passed
            table.add_row(optimization.name, check.name, "ok" if check.passed else "WRONG", escape(check.detail))
        for reason in not_run:
            table.add_row(optimization.name, BEYOND, "not run", escape(reason))
    console.print(table)
    return 1 if wrong else 0


def find_sanitizer() -> str:
    """The path of compute-sanitizer. Raises UserError when it, or a GPU, is not here."""
    if not torch.cuda.is_available():
        raise UserError("compute-sanitizer needs a CUDA device; torch sees none on this machine")
    path = shutil.which("compute-sanitizer", path=os.pathsep.join((os.environ.get("PATH", ""), *USUAL_PLACES)))
    if path is None:
        raise UserError("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    return path


def cannot(optimization: Optimization) -> str | None:
    """None, or why there is nothing to run for this optimization on this machine."""
    if optimization.op is None:
        return "changes the whole loop and has no op of its own"
    if not any(workload.small for workload in optimization.op.workloads):
        return "has no small workload"
    return registry.unmet(optimization.needs, torch.device("cuda"))


def sanitize(
    optimization: Optimization, tools: tuple[str, ...] = TOOLS, repeats: int = REPEATS, timeout: float = TIMEOUT
) -> list[Check]:
    """The checks of one optimization's op, each in a process of its own: a fault in one takes nothing else down.

    Errors in kernels in which the reference has errors as well are PyTorch's: named, but not counted. Nor are initcheck's in
    PyTorch's own kernels which err as well where nothing but PyTorch runs: what cuBLAS writes through the tensor memory
    accelerator initcheck takes for unwritten. What an op leaves unwritten its op check asks for, with poisoned memory.
    Raises UserError where `find_sanitizer` does. The optimization must be one that `registry` finds and `cannot` lets
    through.
    """
    sanitizer, name = find_sanitizer(), optimization.name
    checks = [_repeats(name, repeats, timeout)]  # first: it compiles and tunes what the tools then run
    for tool in tools:
        log = _run(_under(sanitizer, tool, name, "candidate"), timeout)
        check = read_log(tool, *log)
        if not check.passed and places(log[1]):
            known = places(_run(_under(sanitizer, tool, name, "reference"), timeout)[1])
            if tool == "initcheck" and places(log[1]) - known:
                known |= of_pytorch(places(log[1]), places(_run(_under(sanitizer, tool, name, "control"), timeout)[1]))
            check = read_log(tool, *log, known)
        checks.append(check)
    return checks


def beyond_int32(optimization: Optimization, timeout: float = TIMEOUT) -> tuple[list[Check], list[str]]:
    """The op's cases beyond 2^31 elements in a process of their own: checks, and why others did not fit this device."""
    if not any(workload.beyond_int32 for workload in optimization.op.workloads):
        return [], []
    answer, failure = _child(optimization.name, "huge", timeout=timeout)
    if answer is None:
        return [Check(BEYOND, None, 0.0, False, failure, part=5)], []
    return [Check(**check) for check in answer["checks"]], answer["not_run"]


def read_log(tool: str, code: int, log: str, known: frozenset[str] = frozenset()) -> Check:
    """What a tool's output says. Without a summary, or where the program itself failed, nothing was proved, so it fails.

    known: kernels whose errors are somebody else's.
    """
    summary, answer = "; ".join(dict.fromkeys(SUMMARY.findall(log))), _answer(log)
    if not summary or answer is None:
        words = f"{summary or 'no summary'}; {_first(log, places(log))}; the program ended with {code}: {_last(log)}"
        return Check(tool, None, 0.0, False, words, part=5)
    errors, own = _count(log), places(log) - known
    if errors and known and not own:
        innocent = ", ".join(sorted(known))[:200]
        return Check(tool, 0.0, 0.0, True, f"in kernels that err without the candidate, too: {innocent}", part=5)
    detail = f"{summary}: {_first(log, own)}" if errors else f"{answer['workloads']} workloads"
    return Check(tool, float(errors), 0.0, errors == 0, detail, part=5)


def places(log: str) -> frozenset[str]:
    """The kernels that a tool's output names as places of errors."""
    return frozenset(match.strip() for line in _marked(log) for match in PLACE.findall(line))


def of_pytorch(found: frozenset[str], control: frozenset[str]) -> frozenset[str]:
    """Those of the kernels `found` that are PyTorch's, and of a template of which `control` has an instance."""
    templates = {match[1] for place in control if (match := TEMPLATE.search(place))}
    return frozenset(place for place in found if (match := TEMPLATE.search(place)) and match[1] in templates)


def _marked(log: str) -> list[str]:
    return [line for line in log.splitlines() if line.startswith("=========")]


def _count(log: str) -> int:
    """Errors of all processes and, of racecheck, warnings: a hazard that happens to do no harm is a hazard."""
    return sum(int(count) for summary in SUMMARY.findall(log) for count in COUNTS.findall(summary))


def _last(log: str) -> str:
    """The last line that the program itself printed."""
    own = [line.strip() for line in log.splitlines() if line.strip() and not line.startswith("=========")]
    return own[-1] if own else "no output"


def _first(log: str, own: frozenset[str]) -> str:
    """The first error's two lines, from the kernels that count when any does."""
    lines = [line.lstrip("= ").strip() for line in _marked(log)]
    for index, line in enumerate(lines):
        if any(place in line for place in own):
            before = lines[index - 1] + " " if index and line.startswith("at ") else ""
            return f"{before}{line}"[:300]
    return next((line for line in lines if line and not line.startswith("COMPUTE-SANITIZER")), "")[:300]


def _under(sanitizer: str, tool: str, name: str, side: str) -> list[str]:
    watched = [sys.executable, "-m", "abtest.sanitize_child", name, "once", side]
    return [sanitizer, "--tool", tool, "--target-processes", "all", "--print-limit", "10000", *watched]


def _run(words: list[str], timeout: float) -> tuple[int, str]:
    """Exit status and output of a process; a process that takes too long is ended, which its output then says."""
    try:
        done = subprocess.run(
            words, cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", timeout=timeout, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 124, f"ended after {timeout:g} s"
    return done.returncode, done.stdout


def _answer(log: str) -> dict[str, Any] | None:
    """The program's own JSON document, the last one in its output; None when it printed none."""
    for line in reversed(log.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                continue
    return None


def _child(name: str, task: str, *rest: str, timeout: float) -> tuple[dict[str, Any] | None, str]:
    code, log = _run([sys.executable, "-m", "abtest.sanitize_child", name, task, *rest], timeout)
    return (_answer(log) if code == 0 else None), f"the program ended with {code}: {_last(log)}"


def _repeats(name: str, repeats: int, timeout: float) -> Check:
    answer, failure = _child(name, "repeat", str(repeats), timeout=timeout)
    title = f"{repeats} repeats have the same bits"
    if answer is None:
        return Check(title, None, 0.0, False, failure, part=5)
    different = answer["different"]
    detail = "; ".join(different) or f"{answer['workloads']} workloads"
    return Check(title, float(len(different)), 0.0, not different, detail, part=5)


if __name__ == "__main__":
    guarded(main)
