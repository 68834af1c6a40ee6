"""Saving and resuming: one safetensors file is the whole training state, beside weights in the formats others read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from loop.config import Config
from loop.errors import UserError
from loop.files import write_safetensors
from loop.lora import save_adapters
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
    """Full fine-tuning's result: a transformers checkpoint in the compute dtype."""
    run.model.save_pretrained(run.config.output)


def load_state(run: Run, data_hash: str) -> int:
    """Restores what `save_state` wrote and returns the next step.

    Raises UserError when there is nothing to resume, the file is damaged, or it belongs to another run.
    """
    path = run.config.output / STATE_FILE
    if not path.is_file():
        raise UserError(f"--resume: {path} is not there; nothing to resume")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"--resume: {path} is damaged: {error}") from error
    _same_run(path, json.loads(metadata["config"]), flatten(run.config))
    if metadata["data_hash"] != data_hash:
        raise UserError(
            f"--resume: {path} was trained on other data (hash {metadata['data_hash'][:12]}, now {data_hash[:12]})"
        )
    torch.set_rng_state(state.pop("rng.cpu"))
    if "rng.cuda" in state and run.device.type == "cuda":
        torch.cuda.set_rng_state(state["rng.cuda"], run.device)
    run.optimizer.load_state(state)
    return int(metadata["next_step"])


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
    except OSError as error:
        raise UserError(f"--output {config.output}: {error.strerror}") from error
