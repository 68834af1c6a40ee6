"""The two sides as functions of one input tuple, for the op check and the microbenchmark.

The candidate's products are always the kernel's, whatever the table says, so that each tile is gated before it can win.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.contract import Op, Workload

from . import table
from .dispatch import Engine, linear
from .reference import linear_reference
from .tile import Tile

LORA, FULL = {"trained": 0}, {"trained": 1}


def matmul_op(engine: Engine, *more: Workload) -> Op:
    """A linear layer with T rows of D_in features to D_out; trained: whether the weight's gradient is asked for, too; tile:
    one of the engine's tiles, by number. Where it is not given each product has the tile that was fastest on this device,
    and where nothing was measured the first."""

    def candidate(x: Tensor, weight: Tensor, tiles: dict[str, Tile]) -> Tensor:
        return linear(x, weight, lambda kind, left, right: engine.matmul(left, right, tiles[kind]))

    def inputs(workload: Workload, device: torch.device, seed: int) -> tuple[Tensor, Tensor, dict[str, Tile]]:
        x, weight = _tensors(workload, device, seed)
        if "tile" in workload.shape:
            return x, weight, dict.fromkeys(table.PRODUCTS, engine.tiles[workload.shape["tile"]])
        fastest = table.fastest(table.load(engine.table), table.device_key(device), weight, len(x))
        return x, weight, dict.fromkeys(table.PRODUCTS, engine.tiles[0]) | fastest

    each = (Workload(f"tile {tile}", TILED | {"tile": i}, small=True) for i, tile in enumerate(engine.tiles))
    return Op(linear_reference, candidate, inputs, (*SHAPES, *more, *each), _bytes_moved, _flops)


SHAPES = (
    Workload("gate_proj 2B", {"T": 5376, "D_in": 2048, "D_out": 6144} | LORA),
    Workload("down_proj 2B", {"T": 5376, "D_in": 6144, "D_out": 2048} | LORA),
    Workload("o_proj 2B", {"T": 5376, "D_in": 2048, "D_out": 2048} | LORA),
    Workload("gate_proj 2B, trained", {"T": 5376, "D_in": 2048, "D_out": 6144} | FULL),
    Workload("down_proj 2B, trained", {"T": 5376, "D_in": 6144, "D_out": 2048} | FULL),
    Workload("gate_proj 0.8B", {"T": 5376, "D_in": 1024, "D_out": 3584} | LORA),
    Workload("down_proj 0.8B", {"T": 5376, "D_in": 3584, "D_out": 1024} | LORA),
    Workload("head 2B", {"T": 5376, "D_in": 2048, "D_out": 248_320} | LORA),
    Workload("small", {"T": 96, "D_in": 64, "D_out": 160} | FULL, "float32", small=True),
    Workload("small, frozen", {"T": 61, "D_in": 72, "D_out": 40} | LORA, "float32", small=True),
)
TILED = {"T": 133, "D_in": 72, "D_out": 264} | FULL  # several blocks of most tiles, and ragged edges for all


def _tensors(workload: Workload, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """x [T, D_in] that requires a gradient, and the weight [D_out, D_in], which does where it trains."""
    shape, dtype = workload.shape, getattr(torch, workload.dtype)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape["T"], shape["D_in"], generator=generator).to(device, dtype)
    weight = torch.randn(shape["D_out"], shape["D_in"], generator=generator) * shape["D_in"] ** -0.5
    return x.requires_grad_(), weight.to(device, dtype).requires_grad_(bool(shape["trained"]))


def _flops(workload: Workload) -> int:
    """Two products, y and dx, and the weight's gradient where it trains."""
    shape = workload.shape
    return (4 + 2 * shape["trained"]) * shape["T"] * shape["D_in"] * shape["D_out"]


def _bytes_moved(workload: Workload) -> int:
    """Forward reads x and the weight and writes y; backward reads dy and the weight and writes dx, and for the weight's
    gradient reads x and writes it."""
    T, D, O, trained = (workload.shape[key] for key in ("T", "D_in", "D_out", "trained"))
    return getattr(torch, workload.dtype).itemsize * ((2 + trained) * T * D + 2 * T * O + (2 + trained) * D * O)
