"""Training an arm for the record: every step's loss and the fingerprints of everything it changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from abtest import fingerprint as fp
from abtest.census import counted_replays
from abtest.patience import PATIENCE, accumulated
from abtest.perturb import kick
from abtest.states import Held
from loop.batch import PackedBatch
from loop.data import Dataset
from loop.files import write_safetensors
from loop.run import Run

KEYS = ("loss", "gradients", "state", "rng", "lr", "batch", "supervised", "moved", "rested")
SAMPLE = 4096  # elements of a tensor, evenly spread, by which its update is measured


def step_batches(run: Run, dataset: Dataset, step: int) -> list[PackedBatch]:
    return dataset.micro_batches(step, run.config.grad_accum, run.config.data.packs_per_micro_step)


def free_run(
    run: Run,
    dataset: Dataset,
    steps: int,
    on_step: Callable[[int, int], None],
    resync: Mapping[int, Path] | None = None,
    before_step: Callable[[int], None] | None = None,
    kick_seed: int | None = None,
    patience: float = PATIENCE,
) -> dict[str, Any]:
    """Trains for `steps` steps; the loss of each is a double, the sum over its micro-steps' fp32 sums.

    resync: before these steps the optimizer takes the state in the file, the reference's. With `kick_seed` the run is a
    replica for the noise floor: kicked at the start and after every resync, and only its losses are asked for. "still"
    names what no step moved; what a resync moves doesn't count. "moved" is the length of each step's update, "rested" names
    what it left alone, both by `SAMPLE` elements of every tensor: a resync would hide an update that never came. "replays"
    are those of CUDA graphs in each step. patience: seconds for which a step, or a kick, waits for memory.
    """
    out: dict[str, Any] = {key: [] for key in KEYS}
    start, still = _marks(run), set(run.optimizer.masters)
    if kick_seed is not None:
        kick(run, kick_seed, patience=patience)
    replays = []
    with counted_replays() as replayed:
        for step in range(steps):
            if resync and step in resync:
                still -= _moved(run, start)
                take_state(run, resync[step])
                if kick_seed is not None:
                    kick(run, kick_seed + 1000 * step, trained_only=True, patience=patience)
                start = _marks(run)
            if before_step is not None:
                before_step(step)
            batches = step_batches(run, dataset, step)
            earlier = replayed[0]
            _step(run, batches, step, out, kick_seed is None, patience)
            replays.append(replayed[0] - earlier)
            on_step(step + 1, steps)
    still -= _moved(run, start)
    return out | {"still": sorted(still), "replays": replays}


def _marks(run: Run) -> dict[str, str]:
    return fp.fingerprints(run.optimizer.masters)


def _moved(run: Run, start: dict[str, str]) -> set[str]:
    return {name for name, mark in _marks(run).items() if mark != start.get(name)}


def _step(
    run: Run, batches: list[PackedBatch], step: int, out: dict[str, list], fingerprints: bool, patience: float
) -> None:
    supervised = sum(batch.supervised_tokens for batch in batches)
    sums = accumulated(run, batches, supervised, patience)
    if fingerprints:
        out["gradients"].append(fp.fingerprint(run.optimizer.gradients()))
    before = _sampled(run)
    lr, _ = run.optimizer.step(step)
    if fingerprints:
        moved, rested = _update_size(before, _sampled(run))
        out["moved"].append(moved)
        out["rested"].append(rested)
        out["state"].append(fp.fingerprint(run.optimizer.state()))
        out["rng"].append(fp.rng_fingerprint(run.device))
        out["batch"].append(fp.batch_fingerprint(batches))
    out["loss"].append(sum(sums) / max(supervised, 1))
    out["lr"].append(lr)
    out["supervised"].append(supervised)


def _sampled(run: Run) -> dict[str, torch.Tensor]:
    """Copies of up to `SAMPLE` elements of every master."""
    masters = run.optimizer.masters.items()
    return {name: m.detach().reshape(-1)[:: max(m.numel() // SAMPLE, 1)].clone() for name, m in masters}


def _update_size(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> tuple[float, list[str]]:
    """The length of an update, and the tensors that it left alone."""
    if not before:
        return 0.0, []
    squares = torch.stack([(after[name] - value).double().square().sum() for name, value in before.items()]).tolist()
    return math.sqrt(sum(squares)), [name for name, square in zip(before, squares, strict=True) if square == 0]


def save_state(run: Run, path: Path) -> None:
    """The optimizer's whole state: masters, moments, step counts."""
    write_safetensors(path, {name: value.detach().cpu().contiguous() for name, value in run.optimizer.state().items()})


def take_state(run: Run, path: Path) -> None:
    run.optimizer.load_state(load_file(path))


def initial_file(held: Held, run: Run, folder: Path) -> str:
    """The weights that the arm starts from, as a state."""
    path = folder / "step-0.safetensors"
    held.save(run, path)
    return str(path)


@torch.no_grad()
def state_bytes(run: Run) -> int:
    """What `save_state` would write: three fp32 tensors a parameter."""
    return sum(3 * 4 * master.numel() for master in run.optimizer.masters.values())


def device_bytes(device: torch.device) -> int:
    """The memory of a GPU; 0 for a CPU, whose memory is not its own."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
