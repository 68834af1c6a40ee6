"""`python -m bench.peers.export FOLDER`: the run's initial weights as folders that other libraries load.

Reads the configuration from stdin as JSON. Writes FOLDER/model, a transformers checkpoint with its tokenizer, and for LoRA
FOLDER/adapters, the adapters' initial values in PEFT's files.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

from abtest.arm import ROOT
from loop import lora
from loop.config import Config
from loop.data import load_tokenizer
from loop.model import checkpoint_folder, load_model, trainable
from loop.recipe import from_plain, to_plain

MODEL, ADAPTERS = "model", "adapters"
LIMIT_S = 300


def export(config: Config, folder: Path) -> None:
    """Has another process write both folders, so that this one has neither imported transformers nor used the device. Raises
    RuntimeError with the last line that it printed."""
    command = [sys.executable, "-m", "bench.peers.export", str(folder)]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(to_plain(config)),
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"writing the run's weights took more than {LIMIT_S} s") from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"the run's weights could not be written: {last}")


def write(config: Config, folder: Path) -> None:
    """Both folders, from the model that every arm of the run starts from."""
    tokenizer = load_tokenizer(checkpoint_folder(config.model), config.data)
    plain = dataclasses.replace(config, gradient_checkpointing=False, repeatable_attention=False)
    model = load_model(plain, len(tokenizer))
    model.save_pretrained(folder / MODEL)
    tokenizer.save_pretrained(folder / MODEL)
    if config.method == "lora":
        lora.attach(model, config.lora, config.seed)
        values = {name: parameter.detach().float().clone() for name, parameter in trainable(model).items()}
        if config.lora.start_from is not None:
            lora.load_adapters(model, config.lora.start_from, values)
        (folder / ADAPTERS).mkdir()
        lora.save_adapters(model, config.lora, folder / ADAPTERS, str(folder / MODEL), values)


def main() -> None:
    os.nice(10)  # arms may be at work beside it
    write(from_plain(Config(), json.load(sys.stdin)), Path(sys.argv[1]))


if __name__ == "__main__":
    main()
