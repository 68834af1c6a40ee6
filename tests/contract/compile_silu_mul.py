"""Run by test_cross_compile in a process of its own: compiles the silu_mul kernels for GPUs that are not here.

Prints one JSON list, a mapping per kernel, dtype and target, with what its PTX and its cubin say.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.silu_mul import kernel

POINTERS = {kernel._forward_kernel: 3, kernel._backward_kernel: 5}
THREADS_A_WARP = 32


def compile_for(function: triton.JITFunction, dtype: str, capability: int) -> dict[str, object]:
    """What a launch on contiguous tensors, 16-byte aligned and with a size divisible by 16, compiles to."""
    pointers = POINTERS[function]
    signature = {name: f"*{dtype}" for name in function.arg_names[:pointers]} | {"size": "i32", "BLOCK": "constexpr"}
    divisible = {(index,): [["tt.divisibility", 16]] for index in range(pointers + 1)}
    source = ASTSource(function, signature, {"BLOCK": kernel.BLOCK}, divisible)
    target = GPUTarget("cuda", capability, THREADS_A_WARP)
    compiled = triton.compile(source, target=target, options={"num_warps": kernel.WARPS})
    ptx = compiled.asm["ptx"]
    return {
        "kernel": function.__name__,
        "dtype": dtype,
        "capability": capability,
        "target": re.search(r"^\.target (\w+)", ptx, re.MULTILINE).group(1),
        "loads": len(re.findall(r"ld\.global", ptx)),
        "vector_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
        "stores": len(re.findall(r"st\.global", ptx)),
        "vector_stores": len(re.findall(r"st\.global\S*\.v4\.b32", ptx)),
        "shared_bytes": compiled.metadata.shared,
        **resources(compiled.asm["cubin"]),
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and the bytes of stack and local memory that spilling would use."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    numbers = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout))
    return {"registers": int(numbers["REG"]), "stack_bytes": int(numbers["STACK"]), "local_bytes": int(numbers["LOCAL"])}


if __name__ == "__main__":
    results = [compile_for(k, dtype, int(cc)) for k in POINTERS for dtype in ("bf16", "fp32") for cc in sys.argv[1:]]
    print(json.dumps(results))
