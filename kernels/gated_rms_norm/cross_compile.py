"""The kernels of gated_rms_norm as launches on heads of 128, the delta rule's, compile them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.cross_compile import CompileCase, Expected

from . import kernel

WIDTH = 128
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FORWARD = ("p_x", "p_gate", "p_weight", "p_y")
BACKWARD = ("p_dy", "p_x", "p_gate", "p_weight", "p_dx", "p_dgate")
# 128 registers: 4 blocks of 4 warps on an SM. fp32 may take 255: its sums are in fp64, for the last bits, and nobody trains
# in it. Shared memory: 2 tiles of three tensors on their way; 4 blocks have 100 KiB of an SM's 228.
EXPECTED = {
    dtype: Expected(registers=most, shared_bytes=shared)
    for dtype, most, shared in (("bf16", 128, 25 << 10), ("fp32", 255, 49 << 10))
}


def _cases() -> Iterator[CompileCase]:
    for dtype in ("bf16", "fp32"):
        yield _case("forward", kernel._forward_kernel, FORWARD, ("p_rstd",), dtype, False)
        for dweight in (False, True):
            yield _case(
                "backward with dw" if dweight else "backward", kernel._backward_kernel, BACKWARD, ("p_rstd", "p_partial"),
                dtype, dweight,
                DWEIGHT=dweight, STAGES=kernel.stages(kernel.tiling(WIDTH, dweight), DTYPES[dtype]),
            )  # fmt: skip
        yield CompileCase(
            name=f"sum of dw, {dtype}",
            kernel=kernel._reduce_kernel,
            signature={"p_partial": "*fp32", "p_dweight": f"*{dtype}", "programs": "i32"},
            expected=EXPECTED[dtype],
            constexprs={"D": WIDTH, "BP": 1024, "BC": kernel.COLUMNS},
            options={"num_warps": kernel.WARPS_REDUCE},
        )


def _case(
    what: str, function, tensors: tuple[str, ...], fp32: tuple[str, ...], dtype: str, with_dweight: bool, **constexprs: int
) -> CompileCase:
    tile = kernel.tiling(WIDTH, with_dweight)
    options = {"num_warps": tile.pop("num_warps")}
    integers = [name for name in function.arg_names if name.endswith("_stride") or name in ("T", "tiles")]
    return CompileCase(
        name=f"{what}, {dtype}",
        kernel=function,
        signature={name: f"*{dtype}" for name in tensors}
        | dict.fromkeys(fp32, "*fp32")
        | dict.fromkeys(integers, "i32")
        | ({"eps": "fp32"} if "eps" in function.arg_names else {}),
        expected=EXPECTED[dtype],
        constexprs={"D": WIDTH, **tile, **constexprs},
        multiples_of_16=tuple(name for name in integers if name.endswith("_stride")),
        options=options,
    )


CASES = tuple(_cases())
