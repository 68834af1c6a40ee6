"""The kernels of conv_silu_norm as launches at the 2B model's layer compile them: 48 heads of 128, a third of them v's."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.cross_compile import CompileCase, Expected, Instruction

from . import device, kernel

T, HK, K, VALUES = 5376, 16, 128, 2048
LAYER = {"HK": HK, "K": K, "VALUES": VALUES}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Forward 128 registers: 4 blocks of 4 warps on an SM. Backward keeps windows of x and dp, weights and sums of dw in
# registers on purpose. Shared memory: sums that cross warps, and tiles on their way to another layout.
REGISTERS = {"forward": 128, "backward": kernel.REGISTERS, "backward with dw": kernel.REGISTERS_DWEIGHT, "sum of dw": 128}
# One for each of a thread's elements, in front of a row's sum, where a fused one would give lanes different sums.
ROUNDED = {
    "bf16": Instruction("rounded product", r"^mul\.rn(\.ftz)?\.f32", least=4),
    "fp32": Instruction("rounded product", r"^mul\.rn\.f64", least=4),
}


def _case(name: str, dtype: str, function, tensors: tuple[str, ...], others: dict[str, str], **constexprs) -> CompileCase:
    options = {option: constexprs.pop(option) for option in ("num_warps", "maxnreg") if option in constexprs}
    rounded = () if function is device.reduce_kernel else (ROUNDED[dtype],)
    return CompileCase(
        name=f"{name}, {dtype}",
        kernel=function,
        signature={argument: f"*{dtype}" for argument in tensors} | others,
        expected=Expected(registers=REGISTERS[name], shared_bytes=16_384, instructions=rounded),
        constexprs=constexprs,
        multiples_of_16=tuple(argument for argument in others if argument == "x_stride"),
        options=options,
    )


def _cases() -> Iterator[CompileCase]:
    for dtype in DTYPES:
        yield _case(
            "forward", dtype, device.forward_kernel, ("p_x", "p_weight", "p_q", "p_k", "p_v"),
            {"p_starts": "*i32", "p_rstd": "*fp32", "T": "i32", "x_stride": "i32", "eps": "fp32"},
            BLOCKS=2 * HK + VALUES // K, **LAYER, **kernel.forward_tiling(K),
        )  # fmt: skip
        for dweight in (False, True):
            tile = kernel.backward_tiling(T, HK, K, VALUES, DTYPES[dtype], dweight)
            others = dict.fromkeys(("p_rstd", "p_partial"), "*fp32") | dict.fromkeys(("T", "rows", "x_stride"), "i32")
            yield _case(
                "backward with dw" if dweight else "backward", dtype, device.backward_kernel,
                ("p_x", "p_weight", "p_dq", "p_dk", "p_dv", "p_dx"), others | {"p_starts": "*i32"}, DWEIGHT=dweight, **LAYER,
                **{name: value for name, value in tile.items() if name != "rows"},
            )  # fmt: skip
        yield _case(
            "sum of dw", dtype, device.reduce_kernel, ("p_dweight",), {"p_partial": "*fp32", "chunks": "i32"},
            C=2 * HK * K + VALUES, BP=64, BC=kernel.COLUMNS,
        )  # fmt: skip


CASES = tuple(_cases())
