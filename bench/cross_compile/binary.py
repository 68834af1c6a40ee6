"""What PTX and a cubin say about a kernel: registers, memory, accesses, instructions.

The cubin is read through the cuobjdump that comes with Triton.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import triton

WIDE_BYTES = 16  # the most that one thread moves with one instruction on all targets
RESERVED_BYTES = 1024  # of shared memory, for the system, in what cuobjdump says from sm_90 on; no part of a block's limit
RESERVES_FROM = 90
ENTRY = re.compile(r"^ *Function (\S+):\n(.*)$", re.MULTILINE)


def entries(cubin: Path) -> dict[str, dict[str, int]]:
    """Every function of a cubin by name, with its resources as cuobjdump names them: REG, STACK, SHARED, LOCAL."""
    return {
        name: {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", numbers)}
        for name, numbers in ENTRY.findall(_cuobjdump("--dump-resource-usage", str(cubin)))
    }


def resources(cubin: Path, entry: str, capability: int) -> dict[str, int]:
    """registers and spill_bytes a thread, and shared_bytes a block as far as the code declares them."""
    found = entries(cubin)[entry]
    reserved = RESERVED_BYTES if capability >= RESERVES_FROM else 0
    return {
        "registers": found["REG"],
        "spill_bytes": found["STACK"] + found["LOCAL"],
        "shared_bytes": max(0, found["SHARED"] - reserved),
    }


def ptx_instructions(ptx: str) -> list[str]:
    """The lines of PTX that are instructions: no comments, directives, labels or debug information."""
    lines = (re.sub(r"//.*", "", line).strip() for line in ptx.splitlines())
    return [line for line in lines if line and line[0] not in ".{})$" and not line.endswith(":")]


def sass_instructions(cubin: Path, entry: str) -> list[str]:
    """The machine instructions of one kernel."""
    text = _cuobjdump("--dump-sass", "--function", entry, str(cubin))
    return re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", text, re.MULTILINE)


def accesses(instructions: Iterable[str]) -> dict[str, int]:
    """How many loads and stores of global memory PTX has, and how many move less than 16 bytes a thread."""
    widths = []
    for line in instructions:
        match = re.search(r"(?:^|\s)(?:ld|st)((?:\.[\w:]+)+)\s", line)
        if match and "global" in (parts := match.group(1).split(".")):
            vector = next((int(part[1:]) for part in parts if re.fullmatch(r"v\d", part)), 1)
            widths.append(vector * int(re.search(r"\d+$", parts[-1]).group()) // 8)
    return {"accesses": len(widths), "narrow_accesses": sum(width < WIDE_BYTES for width in widths)}


def _cuobjdump(*arguments: str) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout
