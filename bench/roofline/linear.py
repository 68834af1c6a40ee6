"""The matrix products of the layers: projections that share an input as one node, and every product on its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.roofline.parts import Part, Phase, Work, both_ways, op_work
from bench.roofline.setting import Setting
from bench.roofline.shape import Linear, Shape

LORA_OPS = ("lora_matmul", "static_lora", "sm121a_matmul", "tma_matmul")
SHARED = "x, y and weights once; LoRA's A read x together, sums are made inside the products"
FROZEN = "x or dy, weight and result once"
FULL = "x, dy, weight and results once; dW written in fp32"


@dataclass(frozen=True)
class Product:
    """[rows, inner] times [inner, columns], `count` times a micro-step; result_item: bytes of a number of the result."""

    name: str
    phase: Phase
    rows: int
    inner: int
    columns: int
    count: int
    item: int
    result_item: int

    @property
    def work(self) -> Work:
        """Of one time, alone: each operand read once, the result written once."""
        operands = self.rows * self.inner + self.inner * self.columns
        return Work(
            self.item * operands + self.result_item * self.rows * self.columns, 2 * self.rows * self.inner * self.columns
        )


def layer_linears(shape: Shape, setting: Setting) -> list[Part]:
    """The projections of all layers. Where adapters train alone nothing below the first layer's does: no dx there."""
    parts = []
    for kind in dict.fromkeys(shape.kinds):
        count, first = shape.layers(kind), int(setting.method == "lora" and shape.kinds[0] == kind)
        if first:
            parts += group(shape.mixer_inputs(kind), first, setting, ", first layer", dead_dx=True)
        if count > first:
            parts += group(shape.mixer_inputs(kind), count - first, setting)
        parts += group(shape.mixer_output(kind), count, setting)
    parts += group(shape.mlp_inputs, len(shape.kinds), setting)
    return parts + group(shape.mlp_output, len(shape.kinds), setting)


def group(linears: Sequence[Linear], count: int, setting: Setting, where: str = "", dead_dx: bool = False) -> list[Part]:
    """Projections of one x. dead_dx: nobody needs the gradient of x."""
    adapted = [linear for linear in linears if setting.method == "lora" and linear.name in setting.targets]
    parts = _lora(adapted, count, setting, where, dead_dx) if adapted else []
    for linear in linears:
        if linear not in adapted:
            parts += _alone(linear, count, setting, where, dead_dx)
    return parts


def _lora(linears: Sequence[Linear], count: int, setting: Setting, where: str, dead_dx: bool) -> list[Part]:
    T, R, D, item, n = setting.positions, setting.rank, linears[0].fan_in, setting.item, len(linears)
    outs = {f"O{number}": linear.fan_out for number, linear in enumerate(linears, 1)}
    work = op_work("lora_matmul", {"T": T, "D_in": D, "R": R} | outs, setting.dtype)
    weights, adapters = sum(D * out for out in outs.values()), sum(R * (D + out) for out in outs.values())
    forward = Work(item * (T * D + T * sum(outs.values()) + weights + adapters), 2 * T * (weights + adapters))
    if dead_dx:
        work -= Work(item * (T * D + weights + n * R * D), 2 * T * (weights + n * R * D))
    # Forward: all A, then W and B of each. Backward: dy B and dB of each, all dA; for dx W of each and all A.
    launches = (1 + 2 * n, 2 * n + 1 if dead_dx else 3 * n + 2)
    name = ", ".join(linear.name for linear in linears) + where
    return both_ways(name, "matrix", count, work, forward, launches, SHARED, LORA_OPS)


def _alone(linear: Linear, count: int, setting: Setting, where: str, dead_dx: bool) -> list[Part]:
    T, D, O, item = setting.positions, linear.fan_in, linear.fan_out, setting.item
    shape, forward = {"T": T, "D_in": D, "D_out": O}, Work(item * (T * D + T * O + D * O), 2 * T * D * O)
    if setting.trained:
        work = op_work("full_ft_linear", shape | {"held": 0}, setting.dtype)
        return both_ways(linear.name + where, "matrix", count, work, forward, (1, 2), FULL, ("full_ft_linear",))
    work = op_work("sm121a_matmul", shape | {"trained": 0}, setting.dtype)
    parts = both_ways(linear.name + where, "matrix", count, work, forward, (1, 1), FROZEN, LORA_OPS[2:])
    return parts[:1] if dead_dx else parts


def dead_flops(shape: Shape, setting: Setting) -> int:
    """Of the first layer's dx where only adapters train: counted by whoever counts FLOPs a weight, computed by nobody."""
    if setting.method != "lora":
        return 0
    inputs = shape.mixer_inputs(shape.kinds[0])
    adapters = sum(setting.rank * linear.fan_in for linear in inputs if linear.name in setting.targets)
    return 2 * setting.positions * (sum(linear.fan_in * linear.fan_out for linear in inputs) + adapters)


def products(shape: Shape, setting: Setting) -> Iterator[Product]:
    """Every product of every projection on its own, the first layer's dead ones among them."""
    T, R, item = setting.positions, setting.rank, setting.item
    for linear, count in shape.projections():
        D, O = linear.fan_in, linear.fan_out
        yield Product(f"{linear.name}: y = x W'", "forward", T, D, O, count, item, item)
        yield Product(f"{linear.name}: dx = dy W", "backward", T, O, D, count, item, item)
        if setting.trained:
            yield Product(f"{linear.name}: dW = dy' x", "backward", O, T, D, count, item, 4)
        elif linear.name in setting.targets:
            yield Product(f"{linear.name}: h = x A'", "forward", T, D, R, count, item, item)
            yield Product(f"{linear.name}: y += h B'", "forward", T, R, O, count, item, item)
            yield Product(f"{linear.name}: g = dy B", "backward", T, O, R, count, item, item)
            yield Product(f"{linear.name}: dx += g A", "backward", T, R, D, count, item, item)
            yield Product(f"{linear.name}: dA = g' x", "backward", R, T, D, count, item, item)
            yield Product(f"{linear.name}: dB = dy' h", "backward", O, T, R, count, item, item)
