"""One GPU for several processes at once: NVIDIA's Multi-Process Service, for as long as a command runs.

Without it processes take turns on the GPU, and one that launches many small kernels holds it without filling it. Results do
not depend on it. Documentation: NVIDIA's "Multi-Process Service", sections "Environment variables" and "Starting MPS".
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONTROL = "nvidia-cuda-mps-control"
PIPE, LOG = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
PRIORITY = "CUDA_MPS_CLIENT_PRIORITY"
ROOT = Path(__file__).resolve().parent.parent
SECONDS = 30  # for the service to answer
OF_ARMS = {
    # What an arm keeps in pieces that it can't use, the others on its GPU can't have.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    # PyTorch's profiler, which counts an arm's kernels, lets go of CUPTI when it ends. By default it does not, and every
    # later launch of that process takes longer: an arm would be timed slower for having been looked at.
    "TEARDOWN_CUPTI": "1",
}


@contextmanager
def shared_gpu(wanted: bool) -> Iterator[dict[str, str]]:
    """The environment variables with which a process joins in; none if it isn't `wanted`, or can't be had, or if the user
    has a service of their own. Only processes started with them take part; the service ends with the block."""
    if not wanted or PIPE in os.environ or shutil.which(CONTROL) is None:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="mps-") as folder:  # a socket's path must be short
        variables = {PIPE: f"{folder}/pipe", LOG: f"{folder}/log"}
        for path in variables.values():
            Path(path).mkdir()
        environment = dict(os.environ) | variables
        # A service that sees some GPUs alone would number them anew for those who join it.
        everything = {name: value for name, value in environment.items() if name != "CUDA_VISIBLE_DEVICES"}
        try:
            yield variables if _ask(everything, CONTROL, "-d") and _usable(environment) else {}
        finally:
            _ask(environment, CONTROL, text="quit -t 5\n")


def environment_of_arms(variables: dict[str, str]) -> dict[str, str]:
    """That of arms' processes: the user's own, and what `shared_gpu` gave. The user's settings win over ours."""
    return OF_ARMS | dict(os.environ) | variables


def behind_others(environment: dict[str, str]) -> dict[str, str]:
    """`environment` of a process whose kernels get multiprocessors after those of a process for which all others wait; as it
    is where the service is not there. A priority that the user has set stays.

    Not a share of the multiprocessors: a process with a share sees fewer of them, and PyTorch then draws other random
    weights: its generators' streams are laid out for the multiprocessors that there are.
    """
    return {PRIORITY: "1"} | environment if PIPE in environment else environment


def joined(variables: dict[str, str]) -> bool:
    """Whether processes started with `variables` share the GPU through the service, this command's or the user's."""
    return PIPE in dict(os.environ) | variables


def _usable(environment: dict[str, str]) -> bool:
    return _ask(environment, sys.executable, "-m", "abtest.mps")


def _ask(environment: dict[str, str], *command: str, text: str = "") -> bool:
    """Whether the command ends well in time. A daemon keeps its output open, so nothing of that is waited for."""
    try:
        done = subprocess.run(
            command, input=text, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True, env=environment, cwd=ROOT,
            timeout=SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def probe() -> int:
    """0 if a context can be made on the first GPU: what every process that joins in will do."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 1
    device, context = ctypes.c_int(), ctypes.c_void_p()
    failed = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0)
    return int(bool(failed or driver.cuCtxCreate_v2(ctypes.byref(context), 0, device)))


if __name__ == "__main__":
    sys.exit(probe())
