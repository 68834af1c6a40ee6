"""Saving and resuming: one safetensors file is the whole training state, beside weights in the formats others read."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from loop.config import Config
from loop.data import load_tokenizer
from loop.errors import UserError
from loop.files import write_safetensors
from loop.lora import save_adapters
from loop.model import checkpoint_folder
from loop.optim import MOMENTS
from loop.run import Run

STATE_FILE = "training_state.safetensors"
# What may differ between a run and the run it resumes.
FREE = {"steps", "output", "resume", "save_every", "data.cache_dir", "lora.start_from", "device"}


def flatten(config: Any, prefix: str = "") -> dict[str, str]:
    """A configuration as dotted keys and text values."""
    out = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            out |= flatten(value, f"{prefix}{field.name}.")
        else:
            out[prefix + field.name] = str(value)
    return out


def save_state(run: Run, next_step: int, data_hash: str) -> None:
    """Writes the state from which `next_step` follows: masters, moments, RNG; for LoRA the adapter files too."""
    folder = run.config.output
    state = {name: tensor.detach().cpu() for name, tensor in run.optimizer.state().items()}
    state["rng.cpu"] = torch.get_rng_state()
    if run.device.type == "cuda":
        state["rng.cuda"] = torch.cuda.get_rng_state(run.device)
    metadata = {"next_step": str(next_step), "data_hash": data_hash, "config": json.dumps(flatten(run.config))}
    write_safetensors(folder / STATE_FILE, state, metadata)
    if run.config.method == "lora":
        save_adapters(run.model, run.config.lora, folder, run.config.model, run.optimizer.masters)


def save_weights(run: Run) -> None:
    """Full fine-tuning's result: a transformers checkpoint in the compute dtype, with its tokenizer; each file whole."""
    config = run.config
    with tempfile.TemporaryDirectory(prefix=".weights.", dir=config.output) as folder:
        run.model.save_pretrained(folder)
        load_tokenizer(checkpoint_folder(config.model), config.data).save_pretrained(folder)
        for file in sorted(Path(folder).iterdir()):
            os.replace(file, config.output / file.name)


def load_state(run: Run, data_hash: str) -> int:
    """Restores what `save_state` wrote and returns the next step.

    Raises UserError when there is nothing to resume, the file is damaged, or it belongs to another run.
    """
    path = run.config.output / STATE_FILE
    if not path.is_file():
        raise UserError(f"--resume: {path} is not there; nothing to resume")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
        next_step, trained_on, saved = int(metadata["next_step"]), metadata["data_hash"], json.loads(metadata["config"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(f"--resume: {path} is damaged: {why}") from error
    _same_run(path, saved, flatten(run.config))
    if trained_on != data_hash:
        raise UserError(f"--resume: {path} was trained on other data (hash {trained_on[:12]}, now {data_hash[:12]})")
    _fits(path, state, run)
    torch.set_rng_state(state.pop("rng.cpu"))
    if "rng.cuda" in state and run.device.type == "cuda":
        torch.cuda.set_rng_state(state["rng.cuda"], run.device)
    run.optimizer.load_state(state)
    return next_step


def _fits(path: Path, state: dict[str, torch.Tensor], run: Run) -> None:
    masters = run.optimizer.masters.items()
    expected = {f"master.{name}": list(master.shape) for name, master in masters}
    for name, master in masters:
        if any(f"{key}.{name}" in state for key in MOMENTS):  # none before the first step, afterwards all of them
            expected |= {f"{key}.{name}": [] if key == "step" else list(master.shape) for key in MOMENTS}
    for key, shape in ({"rng.cpu": list(torch.get_rng_state().shape)} | expected).items():
        if key not in state:
            raise UserError(f"--resume: {path} is damaged: it lacks {key}")
        if list(state[key].shape) != shape:
            raise UserError(f"--resume: {path}: {key} has shape {list(state[key].shape)}; this run's has {shape}")


def _same_run(path: Path, saved: dict[str, str], now: dict[str, str]) -> None:
    differing = [key for key in now if key not in FREE and saved.get(key) != now[key]]
    if differing:
        words = ", ".join(f"{key} was {saved.get(key)} and is {now[key]}" for key in differing)
        raise UserError(f"--resume: {path} belongs to another configuration: {words}")


def start_output(config: Config) -> None:
    """Makes the output folder. Raises UserError where a run would overwrite another or cannot write."""
    if config.output is None:
        if config.resume:
            raise UserError("--resume needs --output, the folder of the run to go on with")
        return
    if config.output.exists() and not config.output.is_dir():
        raise UserError(f"--output {config.output}: is a file; a folder is expected")
    if (config.output / STATE_FILE).exists() and not config.resume:
        raise UserError(
            f"--output {config.output}: already holds a run; add --resume to go on with it, or choose another folder"
        )
    try:
        config.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=config.output):
            pass  # whether it can be written is better known now than after the first step
    except OSError as error:
        raise UserError(f"--output {config.output}: {error.strerror}") from error
