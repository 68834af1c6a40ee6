"""`python -m kernels.packing.measure`: the loop's micro-step on the same documents padded, and packed at several lengths.

Padded: one document a row. Mean: packs as long as the mean document, a longer one being a pack of its own. Longest: packs as
long as the longest document. Pack: as the recipe has it, one a micro-step. Rows: `--above` of them as the rows of a
micro-step. Above: the same ones joined into one. They take turns, and who begins moves on from round to round. With
`--optimization NAME ...` all of them run with these switched on: what packing saves depends on what the time goes to. The
last line on stdout is one JSON document; everything before it is the same for a reader.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch

from loop.batch import PackedBatch
from loop.cli import guarded, parse
from loop.config import Config, DataConfig, config_of
from loop.device import device_name
from loop.errors import UserError
from loop.model import plain_micro_step
from loop.rows import padded
from loop.run import Run
from loop.training import build

from .kernel import joined, split, stacked

RESAMPLES = 2000


@dataclass(frozen=True)
class Command(Config):
    """Flags of `python -m kernels.packing.measure`."""

    gradient_checkpointing: bool = True
    data: DataConfig = field(default_factory=lambda: DataConfig(fill="shuffled"))
    above: int = 2  # packs of the recipe that are joined into one
    rounds: int = 10  # in which every layout takes its turn
    optimization: tuple[str, ...] = ()  # what to switch on for all layouts, by name


@dataclass(frozen=True)
class Layout:
    """The same documents in one or more micro-steps."""

    name: str
    batches: tuple[PackedBatch, ...]

    @property
    def positions(self) -> int:
        return sum(batch.positions for batch in self.batches)


@dataclass(frozen=True)
class Row:
    """What was measured of a layout: ratio is padded's time over its own, the median of the rounds, and its 95 % interval.

    waste: the share of positions that hold no token. peak_memory_bytes: None on a CPU.
    """

    layout: str
    micro_steps: int
    longest_row: int
    waste: float
    real_tokens_per_s: float
    ratio: float
    ratio_low: float
    ratio_high: float
    peak_memory_bytes: int | None


def layouts(packs: Sequence[PackedBatch]) -> list[Layout]:
    """All layouts of the documents of `packs`, each of one row [1, L]; more than one of them."""
    one = joined(packs)
    lengths = [length for number, length in enumerate(one.lengths) if number not in one.padding]
    mean = -(-sum(lengths) // len(lengths))
    return [
        Layout("padded", tuple(rows for pack in packs for rows in padded(pack))),
        Layout("mean", tuple(split(one, mean))),
        Layout("longest", tuple(split(one, max(lengths)))),
        Layout("pack", tuple(packs)),
        Layout("rows", (stacked(packs),)),
        Layout("above", (one,)),
    ]


def measured(own: Sequence[Layout], sample: Callable[[Layout], float], rounds: int) -> list[list[float]]:
    """Seconds of every layout in every round, [rounds][layouts]; one round before them is thrown away."""
    out = []
    for number in range(-1, rounds):
        shift = number % len(own)
        turns = [*range(shift, len(own)), *range(shift)]
        seconds = {index: sample(own[index]) for index in turns}
        if number >= 0:
            out.append([seconds[index] for index in range(len(own))])
    return out


def summary(own: Sequence[Layout], seconds: list[list[float]], peaks: Sequence[int | None]) -> list[Row]:
    """A row a layout, each beside the first one."""
    times, rows = np.array(seconds), []
    picks = np.random.default_rng(0).integers(0, len(times), size=(RESAMPLES, len(times)))
    for index, layout in enumerate(own):
        ratios = times[:, 0] / times[:, index]
        low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
        real = sum(batch.real_tokens for batch in layout.batches)
        rows.append(Row(
            layout=layout.name,
            micro_steps=len(layout.batches),
            longest_row=max(batch.input_ids.shape[1] for batch in layout.batches),
            waste=1 - real / layout.positions,
            real_tokens_per_s=real / statistics.median(times[:, index]),
            ratio=float(np.median(ratios)), ratio_low=float(low), ratio_high=float(high),
            peak_memory_bytes=peaks[index],
        ))  # fmt: skip
    return rows


class Sampler:
    """Seconds of forward and backward of a layout's micro-steps, and the most memory that each layout took so far."""

    def __init__(self, run: Run, supervised: int) -> None:
        self.run, self.supervised = run, supervised
        self.peaks: dict[str, int | None] = {}

    def __call__(self, layout: Layout) -> float:
        cuda = self.run.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.run.device)
            torch.cuda.reset_peak_memory_stats(self.run.device)
        began = time.perf_counter()
        for batch in layout.batches:
            plain_micro_step(self.run, batch, self.supervised)
        if cuda:
            torch.cuda.synchronize(self.run.device)
        seconds = time.perf_counter() - began
        self.run.optimizer.zero_grad()
        peak = torch.cuda.max_memory_allocated(self.run.device) if cuda else None
        self.peaks[layout.name] = peak if peak is None else max(peak, self.peaks.get(layout.name) or 0)
        return seconds


def line(row: Row) -> str:
    memory = "" if row.peak_memory_bytes is None else f", {row.peak_memory_bytes / 2**30:.2f} GiB"
    return (
        f"{row.layout}: {row.real_tokens_per_s:,.0f} real tokens/s, "
        + f"{row.ratio:.2f} [{row.ratio_low:.2f}, {row.ratio_high:.2f}] times padded, "
        + f"{row.micro_steps} micro-steps, rows up to {row.longest_row}, {row.waste:.1%} waste{memory}"
    )


def main(argv: list[str] | None = None) -> int:
    """Prints a line a layout and the JSON document. Raises UserError for what the user must put right."""
    name = "python -m kernels.packing.measure"
    command = parse(Command(), name, "Measures padded rows beside packs of several lengths.", argv)
    if command.above < 2 or command.rounds < 2:
        raise UserError(f"--above {command.above} --rounds {command.rounds}: at least 2 of each are needed")
    config = config_of(command)
    run, dataset = build(replace(config, data=replace(config.data, rows="packed")), command.optimization)
    _check(run)
    packs = [batch.to(run.device) for batch in dataset.micro_batches(0, command.above, 1)]
    own = layouts(packs)
    sampler = Sampler(run, sum(pack.supervised_tokens for pack in packs))
    seconds = measured(own, sampler, command.rounds)
    rows = summary(own, seconds, [sampler.peaks[layout.name] for layout in own])
    for row in rows:
        print(line(row))
    print(json.dumps({
        "device": device_name(run.device), "model": config.model, "method": config.method,
        "pack_length": config.data.pack_length, "rounds": command.rounds, "enabled": run.enabled,
        "rows": [asdict(row) for row in rows],
    }))  # fmt: skip
    return 0


def _check(run: Run) -> None:
    """Raises UserError where something asked for is off, or would be by-passed."""
    for name, reason in run.refused.items():
        raise UserError(f"--optimization {name}: {reason}")
    if run.micro_step is not plain_micro_step:
        names = " ".join(run.enabled)
        raise UserError(f"--optimization {names}: one has a micro-step of its own, and here the layout decides on it")


if __name__ == "__main__":
    guarded(main)
