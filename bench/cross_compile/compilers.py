"""Triton and nvcc as compilers for a GPU that is not here. Neither needs a driver."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.compiler import ASTSource, make_backend

from bench.cross_compile.binary import entries
from kernels.cross_compile import CompileCase, CudaCase

THREADS_A_WARP = 32


@dataclass(frozen=True)
class Code:
    """What a compiler made. entry: the kernel's name in the cubin. dynamic_shared_bytes: what a launch asks for, a block."""

    entry: str
    compiled_for: str  # the target that the PTX names
    ptx: str
    cubin: bytes
    dynamic_shared_bytes: int
    compilers: dict[str, str]  # name -> version


def jitted(kernel) -> triton.JITFunction:
    """The jitted function, out of the autotuner or the heuristics around it. Raises ValueError for anything else."""
    while not isinstance(kernel, triton.JITFunction):
        if not hasattr(kernel, "fn"):
            raise ValueError(f"{kernel!r} is no jitted function")
        kernel = kernel.fn
    return kernel


def with_triton(case: CompileCase, target: str, scratch: Path) -> Code:
    """Compiles with a cache folder in `scratch` that belongs to `target`.

    Raises ValueError for a case that does not fit its kernel, TritonError or RuntimeError where Triton can't compile it.
    """
    function = jitted(case.kernel)
    types, attributes = _arguments(case, function)
    gpu = GPUTarget("cuda", capability(target), THREADS_A_WARP)
    options = make_backend(gpu).parse_options(dict(case.options))
    unknown = [name for name in case.options if not hasattr(options, name)]
    if unknown:
        raise ValueError(f"Triton has no option {unknown[0]!r}")
    triton.knobs.cache.dir = str(scratch / target)
    compiled = triton.compile(
        ASTSource(function, types, dict(case.constexprs), attributes), target=gpu, options=dict(case.options)
    )
    ptx = compiled.asm["ptx"]
    versions = {"triton": triton.__version__, "ptxas": _version(get_ptxas_version(capability(target)))}
    return Code(compiled.metadata.name, _named(ptx), ptx, compiled.asm["cubin"], compiled.metadata.shared, versions)


def _arguments(case: CompileCase, function: triton.JITFunction) -> tuple[dict[str, str], dict[tuple[int], list]]:
    """The types of all arguments in the kernel's order, and by position what Triton may take for granted."""
    given = {**case.signature, **dict.fromkeys(case.constexprs, "constexpr")}
    twice = set(case.signature) & set(case.constexprs)
    strangers = (set(given) | set(case.multiples_of_16)) ^ set(function.arg_names)
    if twice or strangers:
        wrong = ", ".join(sorted(twice or strangers))
        names = ", ".join(function.arg_names)
        raise ValueError(f"each of the arguments {names} is expected once, in signature or constexprs; not so: {wrong}")
    types = {name: given[name] for name in function.arg_names}
    aligned = [name for name, kind in types.items() if kind.startswith("*") or name in case.multiples_of_16]
    return types, {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}


def nvcc() -> str | None:
    """nvcc's path, or None where there is none."""
    return shutil.which("nvcc")


def with_nvcc(case: CudaCase, target: str, scratch: Path) -> Code:
    """Compiles in a folder of its own under `scratch`. Raises RuntimeError with what nvcc said where it can't, ValueError
    where not exactly one kernel of the file has the name."""
    folder = scratch / f"nvcc-{target}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    cubin = folder / "kernel.cubin"
    command = [nvcc(), "-cubin", f"-arch={target}", *case.flags, "--keep", "--keep-dir", str(folder), "-o", str(cubin)]
    done = subprocess.run([*command, str(case.source)], capture_output=True, text=True, check=False)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
        raise RuntimeError(said.replace(f"{folder}/", "").replace(f"{case.source.parent}/", "").strip())
    named = [entry for entry in entries(cubin) if case.kernel in entry]
    if len(named) != 1:
        raise ValueError(f"{len(named)} kernels of {case.source.name} have {case.kernel!r} in their names; one is expected")
    ptx = (folder / f"{case.source.stem}.ptx").read_text(encoding="utf-8")
    body = re.search(rf"\.entry {re.escape(named[0])}\b.*?^\}}", ptx, re.MULTILINE | re.DOTALL)
    said = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    versions = {"nvcc": _version(said)}
    return Code(named[0], _named(ptx), body.group(), cubin.read_bytes(), case.dynamic_shared_bytes, versions)


def capability(target: str) -> int:
    """121 for sm_121a."""
    return int(re.search(r"\d+", target).group())


def _named(ptx: str) -> str:
    return re.search(r"^\.target (\w+)", ptx, re.MULTILINE).group(1)


def _version(said: str) -> str:
    """12.8.93 out of what `ptxas --version` or `nvcc --version` prints."""
    return re.search(r"\bV(\d+(?:\.\d+)+)", said).group(1)
