"""The kernels of rms_norm as launches on rows of 2048 (a layer's norm) and of 256 (a head's) compile them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.cross_compile import CompileCase, Expected

from . import kernel

STRIDES = {"x_stride": "i32", "residual_stride": "i32", "dy_stride": "i32", "dsum_stride": "i32"}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FORWARD = ("p_x", "p_residual", "p_weight", "p_sum", "p_y")
BACKWARD = ("p_dy", "p_dsum", "p_x", "p_weight", "p_dx")
# 128 registers: 4 blocks of 4 warps on an SM. fp32 may take 255: its sums are in fp64, for the last bits, and nobody trains
# in it. Shared memory: 2 tiles of three tensors on their way; 4 blocks have 100 KiB of an SM's 228.
EXPECTED = {
    dtype: Expected(registers=most, shared_bytes=shared)
    for dtype, most, shared in (("bf16", 128, 25 << 10), ("fp32", 255, 49 << 10))
}


def _case(name: str, function, tensors: tuple[str, ...], dtype: str, fp32: tuple[str, ...], **constexprs) -> CompileCase:
    options = {"num_warps": constexprs.pop("num_warps")}
    names = [argument for argument in function.arg_names if argument in STRIDES or argument in ("T", "tiles")]
    return CompileCase(
        name=name,
        kernel=function,
        signature={argument: f"*{dtype}" for argument in tensors}
        | {argument: "*fp32" for argument in fp32}
        | dict.fromkeys(names, "i32")
        | ({"eps": "fp32"} if "eps" in function.arg_names else {}),
        expected=EXPECTED[dtype],
        constexprs=constexprs,
        multiples_of_16=tuple(argument for argument in names if argument in STRIDES),
        options=options,
    )


def _cases() -> Iterator[CompileCase]:
    for dtype in ("bf16", "fp32"):
        for width, add in ((2048, True), (256, False)):
            what = f"{width} wide{', residual added' if add else ''}, {dtype}"
            own = {"D": width, "ZERO_CENTRED": True, "ADD": add}
            tile = kernel.tiling(width, False)
            yield _case(f"forward, {what}", kernel._forward_kernel, FORWARD, dtype, ("p_rstd",), **own, **tile)
            for dweight in (False, True):
                tile = kernel.tiling(width, dweight)
                yield _case(
                    f"backward{' with dw' if dweight else ''}, {what}", kernel._backward_kernel, BACKWARD, dtype,
                    ("p_rstd", "p_partial"), **own, DWEIGHT=dweight, STAGES=kernel.stages(tile, DTYPES[dtype]), **tile,
                )  # fmt: skip
        yield CompileCase(
            name=f"sum of dw, {dtype}",
            kernel=kernel._reduce_kernel,
            signature={"p_partial": "*fp32", "p_dweight": f"*{dtype}", "programs": "i32"},
            expected=EXPECTED[dtype],
            constexprs={"D": 2048, "BP": 1024, "BC": kernel.COLUMNS},
            options={"num_warps": kernel.WARPS_REDUCE},
        )


CASES = tuple(_cases())
