"""The kernels of decay_gates as launches on the 2B model's 16 heads compile them."""

from __future__ import annotations

from collections.abc import Iterator

from kernels.cross_compile import CompileCase, Expected

from . import kernel

HEADS = 16
INPUTS = ("p_a", "p_b", "p_log", "p_bias")
EXPECTED = Expected(registers=64, shared_bytes=0)


def _cases() -> Iterator[CompileCase]:
    for dtype in ("bf16", "fp32"):
        tensors = {name: f"*{dtype}" for name in INPUTS}
        yield _case("forward", kernel._forward_kernel, dtype, tensors | {"p_beta": f"*{dtype}", "p_g": "*fp32"})
        given = {"p_dbeta": f"*{dtype}", "p_dg": "*fp32"}
        made = {"p_da": f"*{dtype}", "p_db": f"*{dtype}", "p_dlog": "*fp32", "p_dbias": "*fp32"}
        for trained, what in ((False, "backward"), (True, "backward, trained")):
            yield _case(what, kernel._backward_kernel, dtype, given | tensors | made, TRAINED=trained)


def _case(what: str, function, dtype: str, signature: dict[str, str], **constexprs: bool) -> CompileCase:
    return CompileCase(
        name=f"{what}, {dtype}",
        kernel=function,
        signature=signature | {"size": "i32"},
        expected=EXPECTED,
        constexprs={"HEADS": HEADS, "BLOCK": kernel.BLOCK, **constexprs},
        multiples_of_16=("size",),
        options={"num_warps": kernel.WARPS},
    )


CASES = tuple(_cases())
