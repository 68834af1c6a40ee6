"""All parts of a step in order, and their sums."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from bench.ceilings import Ceilings
from bench.roofline import layers
from bench.roofline.linear import dead_flops, layer_linears
from bench.roofline.parts import KINDS, Part, Work, both_ways, op_work
from bench.roofline.setting import Setting, check
from bench.roofline.shape import Shape, shape_of

HEAD_OPS = ("supervised_logits", "linear_cross_entropy")


@dataclass(frozen=True)
class Step:
    """micro_step: forward and backward of one micro-batch; update: what the optimizer does once a step."""

    setting: Setting
    shape: Shape
    micro_step: tuple[Part, ...]
    update: tuple[Part, ...]

    @property
    def product_flops(self) -> int:
        """Of the matrix products of one micro-step as `abtest.census.model_flops` counts them for every weight: without
        recomputation, and with the first layer's dx although adapters don't need it. The head has the supervised rows."""
        counted = sum(part.flops for part in self.micro_step if part.kind == "matrix" and part.phase != "recompute")
        return counted + dead_flops(self.shape, self.setting)

    def floor_us(self, ceilings: Ceilings) -> float:
        """Of one micro-step."""
        return floor_us(self.micro_step, ceilings)

    def matrix_floor_us(self, ceilings: Ceilings) -> float:
        return self.product_flops / ceilings.matmul_flops_per_s * 1e6

    def by_kind(self, ceilings: Ceilings) -> dict[str, float]:
        """Floors of one micro-step, microseconds, by kind of part; the kinds that it has."""
        sums = {kind: floor_us([part for part in self.micro_step if part.kind == kind], ceilings) for kind in KINDS}
        return {kind: value for kind, value in sums.items() if value}

    def per_second(self, microseconds: float) -> float:
        """Positions a second at so long a micro-step."""
        return self.setting.positions / microseconds * 1e6


def floor_us(parts: Iterable[Part], ceilings: Ceilings) -> float:
    return sum(part.floor_us(ceilings) for part in parts)


def step_of(setting: Setting) -> Step:
    """The step of `setting`. Raises UserError for a model or a number that can't be."""
    shape = shape_of(check(setting).model)
    parts = [
        *_embedding(shape, setting), *layers.norms(shape, setting), *layer_linears(shape, setting),
        *layers.attention(shape, setting), *layers.delta(shape, setting), *layers.gated_mlp(shape, setting),
        *_head(shape, setting),
    ]  # fmt: skip
    if setting.gradient_checkpointing:
        parts += [replace(part, phase="recompute") for part in parts if part.in_layer and part.phase == "forward"]
    return Step(setting, shape, tuple(parts), (_update(shape, setting),))


def _embedding(shape: Shape, setting: Setting) -> list[Part]:
    elements = setting.positions * shape.hidden
    forward = Work(2 * setting.item * elements + 8 * setting.positions, 0)
    backward = Work((setting.item + 8) * elements + 8 * setting.positions, elements)
    work = Work(forward.bytes + backward.bytes, backward.flops)
    words = "rows read and written; backward adds them to the fp32 gradient"
    parts = both_ways("embedding", "elementwise", 1, work, forward, (1, 1), words, in_layer=False)
    return parts if setting.trained else parts[:1]


def _head(shape: Shape, setting: Setting) -> list[Part]:
    S, D, V = setting.supervised_rows, shape.hidden, shape.vocabulary
    sizes = {"B": setting.packs, "L": setting.pack_length, "D": D, "V": V, "S": S, "trained": setting.trained}
    work = op_work("supervised_logits", sizes, setting.dtype)
    forward = Work(setting.item * (S * D + V * D), 2 * S * D * V)
    return both_ways(
        "head and cross-entropy", "matrix", 1, work, forward, (2, 1 + setting.trained),
        "supervised rows and the weight once each way; logits never leave the chip", HEAD_OPS, in_layer=False,
    )  # fmt: skip


def _update(shape: Shape, setting: Setting) -> Part:
    """AdamW on fp32 masters: gradients twice, since they are clipped by the norm of all; master and moments both ways."""
    numbers, copies = trained_numbers(shape, setting), 0 if setting.dtype == "float32" else setting.item
    work = Work(numbers * (4 * (2 + 3 + 3) + copies), 16 * numbers)
    words = "fp32 gradients read twice (norm, update), master and both moments read and written, weights written in bf16"
    return Part("clipping and AdamW", "elementwise", "update", 1, work, 2, words, in_layer=False)


def trained_numbers(shape: Shape, setting: Setting) -> int:
    """How many numbers train, vectors left out."""
    if setting.trained:
        return shape.weights()
    adapted = [(linear, count) for linear, count in shape.projections() if linear.name in setting.targets]
    return sum(count * setting.rank * (linear.fan_in + linear.fan_out) for linear, count in adapted)
