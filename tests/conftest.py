"""Shared by all tests: the interpreter switch, the default data, ended processes, and the line that closes a run of gates.

A gate is a lossless test of one optimization: of its op on one workload with one seed, in all autotune configurations or
beyond 2^31 elements, or of a whole arm. The line says how many were executed and how many were not. It is made here, since
with pytest-xdist the process that writes it collects no tests and reads no conftest.py but this one.
"""

from __future__ import annotations

import functools
import gc
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # two processes with two threads each on two cores wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of numpy, which reads it when torch imports it, and of processes

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, so before any test module
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

from kernels.interpreter import exchange_language_once  # late: it imports triton

exchange_language_once()

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background job; tests and their processes get Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

if TYPE_CHECKING:
    from kernels.contract import Needs
    from loop.config import DataConfig
    from loop.data import Dataset

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GATE = "lossless gate"  # the property of a report that is one
LONGEST = (  # files of tests; compiling takes minutes in one test, so it comes after the arms, which need two processes
    "lossless/test_arms.py", "abtest/test_survivors_op_level.py", "abtest/test_end_to_end.py", "lossless/test_ops.py",
    "bench/test_run.py", "contract/test_cross_compile.py", "contract/test_conv_silu_norm.py",
    "abtest/test_catalogue_benign.py", "bench/test_peer_models.py", "abtest/test_parallel.py",
    "abtest/test_structure.py", "abtest/test_catalogue_b.py", "bench/test_search_command.py", "contract/test_cuda_graphs.py",
    "abtest/test_units.py", "abtest/test_catalogue_a.py", "contract/test_packed_attention_kernel.py",
    "bench/test_peers.py", "abtest/test_gate_on_itself.py", "bench/test_profile_command.py", "abtest/test_template.py",
    "abtest/test_closing_line.py", "loop/test_interrupt.py", "contract/test_fp8_mma_build.py", "data/test_default_data.py",
)  # fmt: skip


@pytest.fixture
def gone() -> Callable[[int, float], bool]:
    """Whether a process ends within so many seconds; one that nobody waits for is done with when it is a zombie."""

    def ended(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    def gone(pid: int, within: float) -> bool:
        deadline = time.monotonic() + within
        while not ended(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        return ended(pid)

    return gone


@pytest.fixture(scope="session", autouse=True)
def default_data_read_once() -> Iterator[None]:
    """The default tokenizer and data are loaded once in a process, not for each of the thousand runs that tests build: that
    takes three times as long as all else in building one. Nothing can be written to them; tests/data loads anew."""
    from loop import training  # late: the switch above has to come first

    load_tokenizer, load_dataset = training.load_tokenizer, training.load_dataset

    @functools.cache
    def default_tokenizer(cache_dir: Path) -> Any:
        from loop.config import DataConfig

        return load_tokenizer(None, DataConfig(cache_dir=cache_dir))

    @functools.cache
    def default_dataset(config: DataConfig, seed: int) -> Dataset:
        dataset = load_dataset(config, default_tokenizer(config.cache_dir), seed)
        for document in dataset.documents:
            document.ids.setflags(write=False)
            document.targets.setflags(write=False)
        return dataset

    def tokenizer_of(model: str | None, config: DataConfig) -> Any:
        return default_tokenizer(config.cache_dir) if model is None else load_tokenizer(model, config)

    def dataset_of(config: DataConfig, tokenizer: Any, seed: int) -> Dataset:
        default = config.path is None and tokenizer is default_tokenizer(config.cache_dir)
        return default_dataset(config, seed) if default else load_dataset(config, tokenizer, seed)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "load_tokenizer", tokenizer_of)
        patched.setattr(training, "load_dataset", dataset_of)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_seeds_for_what_is_not_here() -> Iterator[None]:
    """torch.manual_seed keeps the seed for every kind of device that may still come, with the stack of each of its callers:
    under pytest a millisecond a call, and ever more memory. A device that is not here does not come."""
    with pytest.MonkeyPatch.context() as patched:
        for devices in (torch.cuda, torch.xpu, torch.mtia):
            if not devices.is_available():
                patched.setattr(devices, "manual_seed_all", lambda seed: None, raising=False)
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-gpu", action="store_true", help="fail when lossless gates were not executed because they need a GPU"
    )


@dataclass
class Tally:
    """What became of each gate. ops: optimizations whose op was gated with every seed, on however few workloads."""

    executed: int = 0
    failed: int = 0
    need_hardware: int = 0
    skipped: int = 0
    ops: set[str] = field(default_factory=set)

    @property
    def empty(self) -> bool:
        return not (self.executed or self.need_hardware or self.skipped)

    def count(self, name: str, outcome: str, gpu_only: bool) -> None:
        from kernels.registry import discover  # late: the switch above has to come first

        if outcome != "skipped":
            self.executed += 1
            self.failed += outcome == "failed"
        elif lacks_hardware(discover()[name].needs, gpu_only):
            self.need_hardware += 1
        else:
            self.skipped += 1

    def too_large(self) -> int:
        """Gates of workloads that only a GPU is given."""
        from abtest.opcheck import SEEDS, workloads_for
        from kernels.registry import discover

        known, gpu = discover(), torch.device("cuda")
        ops = [known[name].op for name in self.ops]
        return sum(len(SEEDS) * (len(workloads_for(op, gpu)) - len(workloads_for(op, DEVICE))) for op in ops)

    def lacking(self) -> int:
        """Gates that were not executed for want of a GPU, or of another one."""
        return self.need_hardware + self.too_large()

    def line(self) -> str:
        from loop.device import device_name

        where = device_name(DEVICE) if DEVICE.type == "cuda" else "cpu (interpreter)"
        parts = [f"lossless: {self.executed} gates executed on {where}"]
        need = "need another GPU" if DEVICE.type == "cuda" else "need a GPU"
        counts = ((self.failed, "failed"), (self.lacking(), need), (self.skipped, "skipped"))
        return ", ".join(parts + [f"{count} {words}" for count, words in counts if count])


def lacks_hardware(needs: Needs, gpu_only: bool) -> bool:
    """Whether a gate that was skipped was skipped for want of hardware: a GPU, one of another kind, or its memory."""
    from kernels.contract import Needs
    from kernels.registry import unmet

    if DEVICE.type != "cuda":
        return gpu_only or needs.cuda or needs.capability is not None
    return unmet(Needs(capability=needs.capability), DEVICE) is not None or (gpu_only and unmet(needs, DEVICE) is None)


class ClosingLine:
    """Counts reports as they come in, from this process or from xdist's, and closes the run with the line."""

    def __init__(self, config: pytest.Config) -> None:
        self.config, self.tally = config, Tally()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        gate = dict(report.user_properties).get(GATE)
        if gate is not None and (report.when == "call" or (report.when == "setup" and not report.passed)):
            name, gpu_only, of_op = gate
            if of_op:
                self.tally.ops.add(name)
            self.tally.count(name, report.outcome, gpu_only)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        required = self.config.getoption("--require-gpu")
        if required and self.tally.lacking() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
        yield  # the list of skips and failures comes first
        if self.tally.empty:
            return
        lacking = self.tally.lacking()
        terminalreporter.write_line(self.tally.line(), red=bool(self.tally.failed), bold=True)
        if self.config.getoption("--require-gpu") and lacking:
            terminalreporter.write_line(f"--require-gpu: {lacking} gates were not executed, so this run fails", red=True)


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # xdist would begin with the files of most tests
    if not hasattr(config, "workerinput"):  # xdist's workers leave it to the process that started them
        config.pluginmanager.register(ClosingLine(config), "closing line")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[Any]:
    """What is imported and collected stays to the end: the garbage collector need not go through it, now or ever again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Processes that share the suite begin with the files that take longest, so that all of them end together."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        tests = Counter(item.path for item in items)
        longest = {Path(__file__).parent / file: rank for rank, file in enumerate(LONGEST)}
        items.sort(key=lambda item: (longest.get(item.path, len(LONGEST)), -tests[item.path], item.path))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    optimization = item.callspec.params.get("optimization") if hasattr(item, "callspec") else None
    if optimization is not None and item.get_closest_marker("lossless") is not None:
        of_op = {"workload", "seed"} <= item.callspec.params.keys()
        gpu_only = item.get_closest_marker("gpu") is not None
        report.user_properties.append((GATE, (optimization.name, gpu_only, of_op)))
    return report
