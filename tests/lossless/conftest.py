"""Counts the gates that were executed, and says in one closing line which were not.

A gate is a lossless test of one optimization: of its op on one workload with one seed, in all autotune configurations or
beyond 2^31 elements, or of a whole arm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from abtest.opcheck import SEEDS, workloads_for
from kernels.contract import Needs, Optimization
from kernels.registry import unmet
from loop.device import device_name

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Tally:
    """What became of each gate. ops: optimizations whose op was gated with every seed, on however few workloads."""

    executed: int = 0
    failed: int = 0
    need_hardware: int = 0
    skipped: int = 0
    ops: dict[str, Optimization] = field(default_factory=dict)

    def count(self, optimization: Optimization, outcome: str, gpu_only: bool) -> None:
        if outcome != "skipped":
            self.executed += 1
            self.failed += outcome == "failed"
        elif lacks_hardware(optimization.needs, gpu_only):
            self.need_hardware += 1
        else:
            self.skipped += 1

    def too_large(self) -> int:
        """Gates of workloads that only a GPU is given."""
        ops, gpu = [optimization.op for optimization in self.ops.values()], torch.device("cuda")
        return sum(len(SEEDS) * (len(workloads_for(op, gpu)) - len(workloads_for(op, DEVICE))) for op in ops)

    def lacking(self) -> int:
        """Gates that were not executed for want of a GPU, or of another one."""
        return self.need_hardware + self.too_large()

    def line(self) -> str:
        where = device_name(DEVICE) if DEVICE.type == "cuda" else "cpu (interpreter)"
        parts = [f"lossless: {self.executed} gates executed on {where}"]
        need = "need another GPU" if DEVICE.type == "cuda" else "need a GPU"
        counts = ((self.failed, "failed"), (self.lacking(), need), (self.skipped, "skipped"))
        return ", ".join(parts + [f"{count} {words}" for count, words in counts if count])


def lacks_hardware(needs: Needs, gpu_only: bool) -> bool:
    """Whether a gate that was skipped was skipped for want of hardware: a GPU, one of another kind, or its memory."""
    if DEVICE.type != "cuda":
        return gpu_only or needs.cuda or needs.capability is not None
    return unmet(Needs(capability=needs.capability), DEVICE) is not None or (gpu_only and unmet(needs, DEVICE) is None)


TALLY = pytest.StashKey[Tally]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if isinstance(parameters.get("optimization"), Optimization) and item.get_closest_marker("lossless") is not None:
        tally = item.config.stash.setdefault(TALLY, Tally())
        gpu_only = item.get_closest_marker("gpu") is not None
        if "workload" in parameters and "seed" in parameters:
            tally.ops[parameters["optimization"].name] = parameters["optimization"]
        if report.when == "call" or (report.when == "setup" and not report.passed):
            tally.count(parameters["optimization"], report.outcome, gpu_only)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    tally = session.config.stash.get(TALLY, Tally())
    if session.config.getoption("--require-gpu") and tally.lacking() and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> Iterator[None]:
    yield  # the list of skips and failures comes first
    tally = config.stash.get(TALLY, None)
    if tally is None:
        return
    terminalreporter.write_line(tally.line(), red=bool(tally.failed), bold=True)
    if config.getoption("--require-gpu") and tally.lacking():
        terminalreporter.write_line(f"--require-gpu: {tally.lacking()} gates were not executed, so this run fails", red=True)
