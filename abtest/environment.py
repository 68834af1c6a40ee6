"""Where a record was made: device, driver, clocks, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from loop.device import device_name, device_slug

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "transformers", "peft", "flash-linear-attention", "fla-core", "causal-conv1d", "numpy")


def describe(device: torch.device) -> dict[str, Any]:
    """Everything a reader needs to judge a time, as JSON values; what can't be found out is None."""
    return {
        "device": device_name(device),
        "device_slug": device_slug(device),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if device.type == "cuda" else None,
        "driver": _smi("driver_version") if device.type == "cuda" else None,
        "clocks": _smi("clocks.sm,clocks.mem,clocks.max.sm,power.limit") if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "git_sha": _git("rev-parse", "HEAD") or os.environ.get("ISOLOSS_GIT_SHA"),
        "git_dirty": _dirty(),
    }


def _dirty() -> bool | None:
    """Whether tracked files that can change a measurement differ from the commit; None where there is no git. reports/ and
    README.md can't: every rendering of reports writes to both."""
    status = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!reports", ":!README.md")
    return None if status is None else bool(status)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _git(*arguments: str) -> str | None:
    return _output("git", *arguments)


def _smi(fields: str) -> str | None:
    text = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    return text.splitlines()[0] if text else None
