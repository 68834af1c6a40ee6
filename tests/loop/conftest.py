"""One cache, one small data file and one thread for all tests of the loop.

The data are chats of random words whose answers differ much in length, so that micro-batches are unevenly supervised.
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from loop.config import Config, DataConfig, LoraConfig

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode does not; `loop_truth` is shared by the tests here

WORDS = [
    "the", "string", "list", "of", "a", "function", "returns", "value", "when", "called", "with", "empty", "dict", "key"
]  # fmt: skip
SIZES = [(60, 1), (6, 55), (12, 9), (30, 2)]  # words of the question and of the answer


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and on a busy box waiting for them takes a hundred times the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 chats as JSONL."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    lines = []
    for _ in range(48):
        question, answer = (" ".join(draw.choices(WORDS, k=size)) for size in draw.choice(SIZES))
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def make(cache_dir: Path, chats: Path) -> Callable[..., Config]:
    """A small run's configuration on the CPU in fp32: make(steps=2, lora={"rank": 2}, data={"pack_length": 64})."""
    base = Config(
        model="qwen3-tiny",
        steps=3,
        device="cpu",
        dtype="float32",
        lora=LoraConfig(rank=4, alpha=8.0),
        data=DataConfig(path=chats, pack_length=128, cache_dir=cache_dir),
    )

    def make_config(**changes: object) -> Config:
        for key in ("lora", "data", "optim"):
            if key in changes:
                changes[key] = dataclasses.replace(getattr(base, key), **changes[key])
        return dataclasses.replace(base, **changes)

    return make_config


@pytest.fixture
def flags(cache_dir: Path, chats: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Command-line flags of a run that would take a second; what is passed comes last and wins."""

    def make_flags(*last: str, output: str = "out") -> list[str]:
        common = ["--data", str(chats), "--data.cache-dir", str(cache_dir), "--data.pack-length", "128"]
        run = ["--model", "qwen3-tiny", "--steps", "1", "--device", "cpu", "--reports", str(tmp_path / "reports")]
        return [*common, *run, "--output", str(tmp_path / output), *last]

    return make_flags
