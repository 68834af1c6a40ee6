"""`python -m loop.train --data my.jsonl`: trains with what the reports allow on this device."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from loop.cli import guarded, parse
from loop.config import Config, config_of

if TYPE_CHECKING:
    from loop.training import RunLog


@dataclass(frozen=True)
class Command(Config):
    """Flags of `python -m loop.train`."""

    enable: tuple[str, ...] | None = None  # optimizations to switch on; left out: what shipping.toml allows here
    reports: Path | None = None  # the folder with the reports; left out: the project's own


def main(argv: list[str] | None = None) -> int:
    """Trains, printing a line a step to stderr and one JSON line with the result to stdout."""
    command = parse(
        Command(output=Path("runs") / time.strftime("%Y%m%d-%H%M%S")),
        "python -m loop.train",
        "Trains a model on chat data.",
        argv,
    )
    from loop.device import device_name, device_slug
    from loop.errors import UserError
    from loop.model import resolve_device
    from loop.shipping import REPORTS, read_shipping
    from loop.training import NonFiniteLoss, train

    config = config_of(command)
    device, dtype = resolve_device(config)
    names, about = command.enable, [f"{config.model}, {config.method}, {_word(dtype)} on {device_name(device)}"]
    if names is None:
        shipping = read_shipping(config, device_slug(device), _word(dtype), command.reports or REPORTS)
        names = shipping.enable
        about.insert(0, f"shipping {shipping.why}")

    def on_start(run) -> None:
        _say("\n".join(about + [f"not enabled: {name}: {reason}" for name, reason in run.refused.items()]))

    try:
        log = train(config, names, lambda step: _say(_line(step, config.steps)), on_start)
    except NonFiniteLoss as error:
        raise UserError(str(error)) from error
    if log.data.get("skipped"):
        _say(f"skipped examples: {log.data['skipped']}")
    if log.save_seconds > 0.05 * sum(step.seconds for step in log.steps):
        _say(f"checkpoints took {log.save_seconds:.1f} s; --save-every N makes fewer")
    print(json.dumps(_result(config, log)))
    if log.interrupted:
        _say(f"interrupted after {_done(log)}; {_way_on(config)}")
        return 130
    return 0


def _done(log) -> str:
    return f"step {log.steps[-1].step + 1}" if log.steps else "no step"


def _way_on(config: Config) -> str:
    from loop.checkpoint import STATE_FILE

    saved = (config.output / STATE_FILE).exists()
    return f"--resume --output {config.output} goes on" if saved else "nothing was saved yet"


def _word(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _line(step, steps: int) -> str:
    rate = step.real_tokens / step.seconds
    return (
        f"step {step.step + 1}/{steps}  loss {step.loss:.4f}  grad norm {step.grad_norm:.3f}  lr {step.lr:.2e}  "
        f"{rate:,.0f} real tok/s  {step.seconds:.2f} s"
    )


def _result(config: Config, log) -> dict:
    last = log.steps[-1] if log.steps else None
    return {
        "output": str(config.output), "steps": len(log.steps), "final_loss": last.loss if last else None,
        "enabled": list(log.enabled), "refused": log.refused, "data": log.data, "interrupted": log.interrupted,
    }  # fmt: skip


class _CallableModule(ModuleType):
    """Importing this module puts it where the function `loop.train` is looked up, so it trains when called."""

    def __call__(self, config: Config, *arguments: Any, **options: Any) -> RunLog:
        """As `loop.training.train`."""
        from loop.training import train

        return train(config, *arguments, **options)


if __name__ == "__main__":
    guarded(main)
else:
    sys.modules[__name__].__class__ = _CallableModule
