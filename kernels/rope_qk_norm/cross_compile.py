"""The kernels of rope_qk_norm as launches compile them: Qwen3.5's heads of 256, a quarter rotated, Qwen3's of 128."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.cross_compile import CompileCase, Expected

from . import device, kernel

QWEN35 = {"H": 8, "KV": 2, "D": 256, "ZERO_CENTRED": True}
QWEN3 = {"H": 32, "KV": 8, "D": 128, "ZERO_CENTRED": False}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FORWARD = ("p_q", "p_k", "p_qw", "p_kw", "p_cos", "p_sin", "p_qy", "p_ky")
BACKWARD = ("p_dqy", "p_dky", "p_q", "p_k", "p_qw", "p_kw", "p_cos", "p_sin", "p_dq", "p_dk")
# 128 registers: 4 blocks of 4 warps on an SM. fp32 may take 255: its sums are in fp64, for the last bits, and nobody trains
# in it. Shared memory: 2 tiles of gradient, query, cosine and sine on their way; 4 blocks have 132 KiB of an SM's 228.
EXPECTED = {dtype: Expected(registers=most, shared_bytes=33 << 10) for dtype, most in (("bf16", 128), ("fp32", 255))}


def _case(name: str, function, tensors: tuple[str, ...], dtype: str, **constexprs) -> CompileCase:
    options = {key: constexprs.pop(key) for key in ("num_warps", "maxnreg") if key in constexprs}
    others = [argument for argument in function.arg_names if argument not in constexprs and argument not in tensors]
    kinds = {argument: "*fp32" if argument.startswith("p_") else "i32" for argument in others}
    return CompileCase(
        name=f"{name}, {dtype}",
        kernel=function,
        signature={argument: f"*{dtype}" for argument in tensors} | kinds | ({"eps": "fp32"} if "eps" in others else {}),
        expected=EXPECTED[dtype],
        constexprs=constexprs,
        multiples_of_16=tuple(argument for argument in others if argument.endswith("_stride")),
        options=options,
    )


def _cases() -> Iterator[CompileCase]:
    for dtype in ("bf16", "fp32"):
        for name, heads, half in (("Qwen3.5", QWEN35, 32), ("Qwen3", QWEN3, 64)):
            tile = kernel.tiling(heads["D"], half, False)
            tile |= kernel.budget(tile, DTYPES[dtype])
            yield _case(f"forward, {name}", device.forward_kernel, FORWARD, dtype, **heads, **tile)
            for dweight in (False, True):
                tile = kernel.tiling(heads["D"], half, True) if dweight else tile
                what = f"backward{' with dw' if dweight else ''}, {name}"
                own = {"DWEIGHT": dweight, "STAGES": kernel.stages(tile, DTYPES[dtype])}
                yield _case(what, device.backward_kernel, BACKWARD, dtype, **own, **heads, **tile)
        sizes = {"D": QWEN35["D"], "BP": 1024, "BC": kernel.COLUMNS, "num_warps": kernel.WARPS_REDUCE}
        yield _case("sum of dw", device.reduce_kernel, ("p_dqw", "p_dkw"), dtype, **sizes)


CASES = tuple(_cases())
