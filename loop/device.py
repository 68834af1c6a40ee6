"""What device this is: the slug that verdicts are filed under, and a description for records."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """The device in its maker's words, e.g. "NVIDIA H200" or "Intel(R) Xeon(R) Processor, 2 cores"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()}, {_cores()} cores"


def device_slug(device: torch.device) -> str:
    """A folder name for the device, e.g. "nvidia-h200" or "cpu-intel-xeon-processor-2-cores"."""
    name = device_name(device) if device.type == "cuda" else f"cpu {device_name(device)}"
    name = re.sub(r"\((r|tm)\)|@.*?(?=,|$)", " ", name.lower())
    return re.sub(r"[^a-z0-9.]+", "-", name).strip("-")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        if match:
            return " ".join(match.group(1).split())
    return platform.processor() or platform.machine()
