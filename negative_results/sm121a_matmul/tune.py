"""`python -m negative_results.sm121a_matmul.tune`: each tile beside cuBLAS on a model's products; writes the table.

The tiles take turns with cuBLAS, with a cold L2. The one with the best median is then measured again, in pairs with cuBLAS:
of many tiles the luckiest looks faster than it is. `python -m negative_results.tma_matmul.tune` does it for its tiles.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kernels.registry import unmet
from loop.cli import guarded, parse
from loop.config import Config
from loop.errors import UserError
from loop.model import load_model

from . import table
from .dispatch import Engine
from .patch import ENGINE, plain_linears
from .table import Entry
from .tile import Tile

ROUNDS = 10  # in which every tile takes its turn
FLUSHES = 8  # of the L2 before each sample: longer than the host needs to launch what is timed
RESAMPLES = 2000
SAME = 2.0**-7  # of the norm, twice what rounding to bf16 can move: what is further from cuBLAS is another product
TINY_VOCABULARY = 512

Call = Callable[[], Tensor]
Sample = Callable[[Call], float]  # microseconds of one call


@dataclass(frozen=True)
class Command:
    """Flags of `python -m negative_results.sm121a_matmul.tune`."""

    model: str = "qwen3.5-2b"  # whose linear layers are measured: a folder, a hub id or a named shape
    method: Literal["lora", "full"] = "lora"  # full: the products of the weights' gradients, too
    tokens: int = 5376  # rows of a micro-step: pack_length x packs_per_micro_step
    pairs: int = 40  # of the best tile and cuBLAS


@dataclass(frozen=True)
class Problem:
    """One product of a linear layer [out_features, in_features] whose x has so many rows. product: of `table.PRODUCTS`."""

    product: str
    rows: int
    out_features: int
    in_features: int

    def operands(self, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
        """Its two matrices as a layer has them in memory: x and W^T, dy and W, or dy^T and x."""
        x, dy, weight = (self.rows, self.in_features), (self.rows, self.out_features), (self.out_features, self.in_features)
        left, right = {"y": (x, weight), "dx": (dy, weight), "dw": (dy, x)}[self.product]
        one, other = (torch.randn(size, device=device, dtype=dtype) for size in (left, right))
        return one.t() if self.product == "dw" else one, other.t() if self.product == "y" else other


def main(argv: list[str] | None = None, engine: Engine = ENGINE) -> int:
    """Prints a line a product and writes the engine's table. Raises UserError for what the user must put right."""
    command = parse(
        Command(), table.tuner(engine.table), "Measures matmul tiles beside cuBLAS and writes the table of winners.", argv
    )
    if command.tokens < 1 or command.pairs < 2:
        raise UserError(f"--tokens {command.tokens} --pairs {command.pairs}: at least 1 and 2 are needed")
    if not torch.cuda.is_available():
        raise UserError("tiles are measured on a GPU, and torch sees no CUDA device on this machine")
    device = torch.device("cuda", torch.cuda.current_device())
    reason = unmet(engine.needs, device)
    if reason:
        raise UserError(f"{engine.name} {reason}")
    known = table.load(engine.table)  # what is wrong with it is said before the measurement, not after
    sample, found = cuda_sampler(device), []
    for problem in problems(command):
        choice = measured(engine, *problem.operands(device), sample, command.pairs)
        print(line(problem, choice), flush=True)
        if choice is not None:
            found.append(entry(problem, choice, table.device_key(device)))
    try:
        table.save(engine.table, table.merged(known, found))
    except OSError as error:
        raise UserError(f"{engine.table}: {error.strerror or error}") from error
    print(f"written: {engine.table}")
    return 0


def problems(command: Command) -> Iterator[Problem]:
    """Every product of every linear layer that a run of the model may swap, each shape once, in the model's order."""
    built = load_model(Config(model=command.model, device="cuda", dtype="bfloat16"), TINY_VOCABULARY)
    shapes = dict.fromkeys((layer.out_features, layer.in_features) for layer in plain_linears(built).values())
    del built  # its memory is needed
    for shape in shapes:
        for product in table.PRODUCTS if command.method == "full" else table.PRODUCTS[:2]:
            yield Problem(product, command.tokens, *shape)


@dataclass(frozen=True)
class Choice:
    """The fastest tile, and cuBLAS's time over its own: the median of the pairs and its 95 % interval."""

    tile: Tile
    ratio: float
    ratio_low: float
    ratio_high: float

    @property
    def wins(self) -> bool:
        return self.ratio_low > 1


def measured(engine: Engine, left: Tensor, right: Tensor, sample: Sample, pairs: int) -> Choice | None:
    """The engine's fastest tile for left @ right beside torch.mm; None where it takes no such matrices or no tile is right.

    A tile for which the device has too little memory, or that computes another product, is left out.
    """

    def cublas() -> Tensor:
        return torch.mm(left, right)

    if not engine.takes(left, right):
        return None
    calls = {tile: _call(engine, left, right, tile) for tile in engine.tiles}
    wanted = cublas()
    calls = {tile: call for tile, call in calls.items() if _is_right(tile, call, wanted)}
    del wanted
    if not calls:
        return None
    best = fastest_of(calls, cublas, sample)
    return Choice(best, *paired(cublas, calls[best], sample, pairs))


def fastest_of(calls: Mapping[Tile, Call], cublas: Call, sample: Sample) -> Tile:
    """The tile with the smallest median; all take turns, cuBLAS among them, so that each follows the same neighbours."""
    times: dict[Tile, list[float]] = {tile: [] for tile in calls}
    for _ in range(ROUNDS):
        sample(cublas)
        for tile, call in calls.items():
            times[tile].append(sample(call))
    return min(times, key=lambda tile: float(np.median(times[tile])))


def paired(cublas: Call, call: Call, sample: Sample, pairs: int) -> tuple[float, float, float]:
    """cuBLAS's time over the call's: the median of pairs, half of which each side begins, and its 95 % interval."""
    ratios = []
    for index in range(pairs):
        if index % 2:
            ours = sample(call)
            ratios.append(sample(cublas) / ours)
        else:
            theirs = sample(cublas)
            ratios.append(theirs / sample(call))
    values = np.asarray(ratios)
    picks = np.random.default_rng(0).integers(0, len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[picks], axis=1), [2.5, 97.5])
    return float(np.median(values)), float(low), float(high)


def cuda_sampler(device: torch.device) -> Sample:
    """Device time of a call with a cold L2: a buffer of twice its size is written, so often that it hides the launch."""
    properties = torch.cuda.get_device_properties(device)
    flush = torch.empty(2 * properties.L2_cache_size, dtype=torch.uint8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(function: Call) -> float:
        for _ in range(FLUSHES):
            flush.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    return sample


def _call(engine: Engine, left: Tensor, right: Tensor, tile: Tile) -> Call:
    return lambda: engine.matmul(left, right, tile)


def _is_right(tile: Tile, call: Call, wanted: Tensor) -> bool:
    """Whether the tile runs here and computes what cuBLAS does. Its first call also compiles it, outside the measurement."""
    from triton.runtime.errors import OutOfResources

    try:
        got = call()
    except OutOfResources:
        return False
    norm = torch.linalg.vector_norm
    apart = float(norm(got - wanted, dtype=torch.float32) / norm(wanted, dtype=torch.float32))
    if not apart <= SAME:  # NaN is not, either
        print(f"left out: {tile} is {apart:.2g} of the norm away from cuBLAS's product", file=sys.stderr)
        return False
    return True


def line(problem: Problem, choice: Choice | None) -> str:
    """What is printed of a product."""
    what = f"{problem.product} of {problem.rows} rows, [{problem.out_features}, {problem.in_features}]: "
    if choice is None:
        return what + "cuBLAS, since no tile computes it here"
    chosen = str(choice.tile) if choice.wins else "cuBLAS"
    return (
        what + f"{chosen}; cuBLAS takes {choice.ratio:.3f} [{choice.ratio_low:.3f}, {choice.ratio_high:.3f}] times as long"
    )


def entry(problem: Problem, choice: Choice, device: str) -> Entry:
    """What the table keeps of a product."""
    import triton

    return Entry(
        device=device,
        dtype="bfloat16",
        product=problem.product,
        rows=table.bucket(problem.rows),
        out_features=problem.out_features,
        in_features=problem.in_features,
        tile=choice.tile,
        wins=choice.wins,
        ratio=choice.ratio,
        ratio_low=choice.ratio_low,
        ratio_high=choice.ratio_high,
        measured_rows=problem.rows,
        versions=f"torch {torch.__version__}, Triton {triton.__version__}",
    )


if __name__ == "__main__":
    guarded(main)
