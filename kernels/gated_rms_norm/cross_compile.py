"""The kernels of gated_rms_norm as launches on heads of 128, the delta rule's, compile them."""

from __future__ import annotations

from collections.abc import Iterator

from kernels.cross_compile import CompileCase, Expected

from . import kernel

WIDTH = 128
FORWARD = ("p_x", "p_gate", "p_weight", "p_y")
BACKWARD = ("p_dy", "p_x", "p_gate", "p_weight", "p_dx", "p_dgate")
# 128 registers: 4 blocks of 4 warps on an SM. fp32 may take 240: its sums are in fp64, for the last bits, and nobody trains
# in it. Shared memory: sums that cross warps, and a tile of dw on its way to another layout.
EXPECTED = {dtype: Expected(registers=most, shared_bytes=16_384) for dtype, most in (("bf16", 128), ("fp32", 240))}


def _cases() -> Iterator[CompileCase]:
    for dtype in ("bf16", "fp32"):
        yield _case("forward", kernel._forward_kernel, FORWARD, ("p_rstd",), dtype, kernel.TILE)
        for dweight in (False, True):
            yield _case(
                "backward with dw" if dweight else "backward", kernel._backward_kernel, BACKWARD, ("p_rstd", "p_partial"),
                dtype, kernel.TILE_DWEIGHT if dweight else kernel.TILE, DWEIGHT=dweight,
            )  # fmt: skip
        yield CompileCase(
            name=f"sum of dw, {dtype}",
            kernel=kernel._reduce_kernel,
            signature={"p_partial": "*fp32", "p_dweight": f"*{dtype}", "programs": "i32"},
            expected=EXPECTED[dtype],
            constexprs={"D": WIDTH, "BP": kernel.PROGRAMS, "BC": kernel.COLUMNS},
        )


def _case(
    what: str, function, tensors: tuple[str, ...], fp32: tuple[str, ...], dtype: str, elements: int, **constexprs: bool
) -> CompileCase:
    tile = kernel.tiling(WIDTH, elements)
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
