"""The kernels of conv_silu_norm as launches at the 2B model's layer compile them: 48 heads of 128, a third of them v's."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.cross_compile import CompileCase, Expected, Instruction

from . import backward, forward, kernel

T, HK, K, VALUES = 5376, 16, 128, 2048
LAYER = {"HK": HK, "K": K, "VALUES": VALUES}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# One for each of a thread's elements in front of a row's sum, where a fused one would give lanes different sums.
ROUNDED = {
    "bf16": Instruction("rounded product", r"^mul\.rn(\.ftz)?\.f32", least=4),
    "fp32": Instruction("rounded product", r"^mul\.rn\.f64", least=4),
}
NO_BARRIER = Instruction("barrier", r"\bBAR\.", code="sass", least=0, most=0)  # a program is one warp with one head


def _case(name: str, dtype: str, function, tensors: tuple[str, ...], others: dict[str, str], **constexprs) -> CompileCase:
    options = {option: constexprs.pop(option) for option in ("num_warps", "maxnreg") if option in constexprs}
    walks = function is not backward.reduce_kernel
    return CompileCase(
        name=f"{name}, {dtype}",
        kernel=function,
        signature={argument: f"*{dtype}" for argument in tensors} | others,
        expected=Expected(
            registers=options.get("maxnreg", 128),
            shared_bytes=0 if walks else 16_384,  # sums of dw cross warps
            instructions=(ROUNDED[dtype], NO_BARRIER) if walks else (),
        ),
        constexprs={name: value for name, value in constexprs.items() if name != "rows"},
        options=options,
    )


def _cases() -> Iterator[CompileCase]:
    walk = {"p_starts": "*i32", "p_rstd": "*fp32", "T": "i32", "rows": "i32"}
    layer = LAYER | {"X_STRIDE": 2 * HK * K + VALUES}
    for dtype in DTYPES:
        yield _case(
            "forward", dtype, forward.forward_kernel, ("p_x", "p_weight", "p_q", "p_k", "p_v"), walk | {"eps": "fp32"},
            **layer, **kernel.forward_tiling(T, HK, K, VALUES, DTYPES[dtype]),
        )  # fmt: skip
        for dweight in (False, True):
            yield _case(
                "backward with dw" if dweight else "backward", dtype, backward.backward_kernel,
                ("p_x", "p_weight", "p_dq", "p_dk", "p_dv", "p_dx"), walk | {"p_partial": "*fp32"}, DWEIGHT=dweight,
                **layer, **kernel.backward_tiling(T, HK, K, VALUES, DTYPES[dtype], dweight),
            )  # fmt: skip
        yield _case(
            "sum of dw", dtype, backward.reduce_kernel, ("p_dweight",), {"p_partial": "*fp32", "chunks": "i32"},
            C=2 * HK * K + VALUES, BP=64, BC=kernel.COLUMNS,
        )  # fmt: skip


CASES = tuple(_cases())
