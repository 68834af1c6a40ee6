"""The vanilla PyTorch training loop. `loop.train(config, enable=())` trains and returns a `RunLog`."""

from typing import Any


def __getattr__(name: str) -> Any:
    # Lazy, so that a command can report a bad flag without waiting for torch and transformers.
    if name in ("train", "RunLog", "build"):
        from loop import training

        return getattr(training, name)
    if name == "Config":
        from loop.config import Config

        return Config
    raise AttributeError(f"module 'loop' has no attribute {name!r}")
