"""Each configuration of an autotuned kernel is run on its own, so the wrong one is found although it isn't the fastest."""

from __future__ import annotations

import dataclasses
import io
import sys
from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from abtest.autotune import IDLE, PRUNED, check_every_configuration, chosen, complaints, tuners
from abtest.opcheck import OpReport
from abtest.verdict import Level, Verdict
from abtest.worker import COMMANDS, Worker
from kernels import registry
from kernels.contract import Exactness, Needs, Op, Optimization, Workload
from kernels.registry import interpreting

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = (Workload("small", {"T": 100}, "float32", small=True), Workload("tiny", {"T": 7}, "float32", small=True))
LARGE = Workload("large", {"T": 1 << 20}, "float32")


def configurations(*wrong: bool) -> list[triton.Config]:
    return [triton.Config({"BLOCK": 32 << index, "WRONG": bad}, num_warps=1) for index, bad in enumerate(wrong)]


def drop_wide(configs: list[triton.Config], arguments: dict, **keywords) -> list[triton.Config]:
    return [config for config in configs if config.kwargs["BLOCK"] <= 32 or arguments["size"] > 50]


@triton.autotune(configurations(False, True), key=["size"])
@triton.heuristics({"EVEN": lambda arguments: arguments["size"] % arguments["BLOCK"] == 0})
@triton.jit
def double_kernel(p_x, p_y, size, BLOCK: tl.constexpr, WRONG: tl.constexpr, EVEN: tl.constexpr):
    o_block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_block = o_block < size
    b_x = tl.load(p_x + o_block, mask=m_block)
    b_y = 2.0 * b_x
    if WRONG:
        b_y = b_y * 1.01
    tl.store(p_y + o_block, b_y, mask=m_block)


@triton.heuristics({"ONE": lambda arguments: 1})
@triton.autotune(configurations(False, False), key=["size"], prune_configs_by={"early_config_prune": drop_wide})
@triton.jit
def backward_kernel(p_x, p_y, size, BLOCK: tl.constexpr, WRONG: tl.constexpr, ONE: tl.constexpr):
    o_block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + o_block, 2.0 * tl.load(p_x + o_block, mask=o_block < size), mask=o_block < size)


@triton.autotune(configurations(False), key=["size"])
@triton.jit
def unused_kernel(p_x, size, BLOCK: tl.constexpr, WRONG: tl.constexpr):
    tl.store(p_x, size)


def launch(kernel, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    kernel[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x.contiguous(), y, x.numel())
    return y


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return launch(double_kernel, x)

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        return launch(backward_kernel, dy)


def inputs(workload: Workload, device: torch.device, seed: int) -> tuple[Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(workload.shape["T"], generator=generator, device=device).requires_grad_(),)


@pytest.fixture(autouse=True)
def untuned():
    """What one test has a tuner choose, the next one must not find."""
    kernels = (double_kernel, backward_kernel.fn, unused_kernel)
    before = [dict(vars(tuner)) | {"cache": {}} for tuner in kernels]
    yield
    for tuner, attributes in zip(kernels, before, strict=True):
        vars(tuner).clear()
        vars(tuner).update(attributes)


@pytest.fixture
def optimization(monkeypatch) -> Optimization:
    """One whose folder holds the kernels above, two of them under a second name as well."""
    package, kernel = ModuleType("kernels.two_configurations"), ModuleType("kernels.two_configurations.kernel")
    kernel.double_kernel, kernel.backward_kernel, kernel.unused = double_kernel, backward_kernel, unused_kernel
    package.again = double_kernel
    for module in (package, kernel):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    op = Op(lambda x: 2 * x, Double.apply, inputs, (*SMALL, LARGE), lambda w: 1, lambda w: 1)
    return Optimization(
        "two_configurations", "", Exactness.ROUNDING, "", lambda run: None, lambda run: None, op, Needs(triton=True)
    )


def test_tuners_are_found_below_heuristics_and_once(optimization):
    found = tuners(optimization)
    assert [name.rpartition(".")[2] for name in found] == ["again", "backward_kernel", "unused"]
    assert all(type(tuner) is triton.runtime.Autotuner for tuner in found.values())


@pytest.mark.parametrize("name", sorted(registry.discover()))
def test_an_optimization_without_a_tuner_has_nothing_to_check(name):
    optimization = registry.discover()[name]
    if not tuners(optimization):
        assert check_every_configuration(optimization, DEVICE, 0) == []
    assert isinstance(chosen(optimization), dict)


def test_the_wrong_configuration_is_found_and_the_others_pass(optimization):
    reports = check_every_configuration(optimization, DEVICE, 0)
    reports = [row for row in reports if row[2].workload.small and row[2].workload.dtype == "float32"]
    levels = {(kernel.rpartition(".")[2], config.partition(", WRONG")[0], report.workload.name): report.verdict.level
              for kernel, config, report in reports}  # fmt: skip
    green = (Level.BITWISE, Level.ROUNDING)
    assert len(reports) == len(levels) == 10
    for workload in ("small", "tiny"):
        assert levels["again", "BLOCK: 32", workload] in green
        assert levels["again", "BLOCK: 64", workload] is Level.FAILED
        assert levels["backward_kernel", "BLOCK: 32", workload] in green
        assert levels["unused", "BLOCK: 32", workload] is Level.NOT_RUN
    assert levels["backward_kernel", "BLOCK: 64", "small"] in green
    assert levels["backward_kernel", "BLOCK: 64", "tiny"] is Level.NOT_RUN  # pruned by its author
    wrong = next(report for _, _, report in reports if report.verdict.level is Level.FAILED)
    assert "output 0" in wrong.verdict.reason and "mean ratio" in wrong.verdict.reason
    reasons = {report.verdict.reason for _, _, report in reports if report.verdict.level is Level.NOT_RUN}
    assert reasons == {PRUNED, IDLE}


def test_what_is_wrong_or_was_never_reached_is_complained_of(optimization):
    reports = check_every_configuration(optimization, DEVICE, 0)
    found = complaints(reports, Exactness.ROUNDING, torch.device("cpu"))
    assert len(found) == sum(report.verdict.level is Level.FAILED for _, _, report in reports) >= 2
    assert all("again in BLOCK: 64" in words for words in found)
    assert "on small, float32: " in found[0] and "output 0" in found[0]
    on_gpu = complaints(reports, Exactness.ROUNDING, torch.device("cuda"))
    assert len(on_gpu) == len(found) + 1 and "unused in BLOCK: 32" in on_gpu[-1] and "reached by no workload" in on_gpu[-1]
    of_a_package = [(f"fla.{kernel}", configuration, report) for kernel, configuration, report in reports]
    assert len(complaints(of_a_package, Exactness.ROUNDING, torch.device("cuda"))) == len(found)
    right = [row for row in reports if row[2].verdict.level.lossless]
    assert right and complaints(right, Exactness.ROUNDING, torch.device("cuda")) == []


def test_a_failure_of_another_configuration_is_not_told_of_a_pruned_one(optimization, monkeypatch):
    """Where its author prunes one, the other runs, whose failure is its own."""
    monkeypatch.setattr(double_kernel, "early_config_prune", lambda configs, arguments, **keywords: configs[1:])
    reports = check_every_configuration(optimization, DEVICE, 0)
    first = [report for kernel, config, report in reports if "again" in kernel and "BLOCK: 32" in config]
    second = [report for kernel, config, report in reports if "again" in kernel and "BLOCK: 64" in config]
    assert {report.verdict.reason for report in first} == {PRUNED}
    assert {report.verdict.level for report in second} == {Level.FAILED}


def test_on_a_gpu_small_workloads_are_tried_in_bf16_and_larger_ones_where_those_do_not_reach(optimization, monkeypatch):
    tried = []

    def check(op, workload, device, seed, exactness):
        tried.append((workload.name, workload.dtype))
        tuner = double_kernel
        pruned = workload.small and tuner.prune_configs({}) == [tuner.configs[1]]
        tuner.best_config = None if pruned else tuner.prune_configs({})[0]
        return OpReport(workload, "cuda", seed, Verdict(Level.ROUNDING, ""))

    monkeypatch.setattr("abtest.autotune.check_op", check)
    monkeypatch.setattr("abtest.autotune.tuners", lambda optimization: {"double": double_kernel})
    larger = (*SMALL, LARGE, dataclasses.replace(LARGE, name="larger"))
    wide = dataclasses.replace(optimization, op=dataclasses.replace(optimization.op, workloads=larger))
    reports = check_every_configuration(wide, torch.device("cuda"), 0)
    small = [("small", "float32"), ("tiny", "float32"), ("small", "bfloat16"), ("tiny", "bfloat16")]
    assert tried == [*small, *small, ("large", "bfloat16")]
    assert [report.verdict.reason for _, _, report in reports[4:]] == [IDLE] * 4 + [""]
    assert complaints(reports, Exactness.ROUNDING, torch.device("cuda")) == []


def test_kernels_of_a_package_are_checked_where_the_op_launches_them(optimization, monkeypatch):
    """The folder of this optimization has no kernel: all are its package's, and one of those isn't the op's."""
    for name in ("fake_fla", "fake_fla.ops"):
        module = ModuleType(name)
        module.__spec__ = object()
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["fake_fla.ops"].double, sys.modules["fake_fla.ops"].unused = double_kernel, unused_kernel
    user = dataclasses.replace(optimization, name="no_kernels_of_its_own", needs=Needs(packages=("fake_fla",)))
    monkeypatch.setattr(double_kernel, "_do_bench", lambda call, quantiles: [call() or 0.0] * 3)
    monkeypatch.setattr(backward_kernel.fn, "_do_bench", lambda call, quantiles: [call() or 0.0] * 3)
    reports = check_every_configuration(user, DEVICE, 0)
    assert {kernel for kernel, _, _ in reports} == {"fake_fla.ops.double"}
    levels = {config.partition(", WRONG")[0]: report.verdict.level for _, config, report in reports}
    assert levels["BLOCK: 32"].lossless and levels["BLOCK: 64"] is Level.FAILED


def test_tuners_are_left_as_they_were(optimization):
    found = tuners(optimization)
    before = {name: dict(vars(tuner)) for name, tuner in found.items()}
    check_every_configuration(optimization, DEVICE, 0)
    assert {name: vars(tuner) for name, tuner in found.items()} == before
    assert all(len(tuner.configs) == 2 for name, tuner in found.items() if "unused" not in name)


def test_they_are_restored_when_a_check_stops(optimization):
    def interrupted(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    broken = dataclasses.replace(optimization, op=dataclasses.replace(optimization.op, candidate=interrupted))
    before = dict(vars(tuners(optimization)["kernels.two_configurations.again"]))
    with pytest.raises(KeyboardInterrupt):
        check_every_configuration(broken, DEVICE, 0)
    assert vars(tuners(optimization)["kernels.two_configurations.again"]) == before


def test_a_configuration_beyond_the_device_is_not_a_failure(optimization):
    def too_much(x: Tensor) -> Tensor:
        raise triton.runtime.errors.OutOfResources(300_000, 101_376, "shared memory")

    broken = dataclasses.replace(optimization, op=dataclasses.replace(optimization.op, candidate=too_much))
    reports = check_every_configuration(broken, DEVICE, 0)
    assert {report.verdict.level for _, _, report in reports} == {Level.NOT_RUN}
    assert "OutOfResources" in reports[0][2].verdict.reason


def test_what_was_chosen_is_told_for_each_tuner_that_ran(optimization, monkeypatch):
    first, second = double_kernel.configs
    monkeypatch.setattr(double_kernel, "cache", {(100, "float32"): first, (7, "float32"): second, (9, "float32"): first})
    monkeypatch.setattr(unused_kernel, "best_config", unused_kernel.configs[0], raising=False)
    assert chosen(optimization) == {
        "kernels.two_configurations.again": f"{first}; {second}",
        "kernels.two_configurations.kernel.unused": str(unused_kernel.configs[0]),
    }


def test_third_party_tuners_are_told_once_they_ran(optimization, monkeypatch):
    module = ModuleType("fake_fla.ops.gate")
    module.kernel, module.idle = backward_kernel, unused_kernel
    for name in ("fake_fla", "fake_fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules[name].__spec__ = object()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    user = dataclasses.replace(optimization, name="no_kernels_of_its_own", needs=Needs(packages=("fake_fla",)))
    assert chosen(user) == {}
    tuner = backward_kernel.fn
    monkeypatch.setattr(tuner, "cache", {("key",): tuner.configs[1]})
    assert chosen(user) == {"fake_fla.ops.gate.kernel": str(tuner.configs[1])}


@pytest.mark.skipif(interpreting(), reason="Triton's interpreter can't time, so its autotuners never choose")
def test_a_choice_on_a_gpu_is_told(optimization):
    Double.apply(*inputs(SMALL[0], DEVICE, 0))
    assert set(chosen(optimization)) == {"kernels.two_configurations.again"}


def test_an_arm_tells_what_its_kernels_chose(optimization, monkeypatch):
    worker = Worker(io.StringIO())
    worker.optimizations = ["two_configurations"]
    monkeypatch.setattr("kernels.registry.select", lambda names: [optimization] if names == ["two_configurations"] else [])
    assert worker.autotuned() == {}
    monkeypatch.setattr(double_kernel, "cache", {(100, "float32"): double_kernel.configs[1]})
    assert worker.autotuned() == {"kernels.two_configurations.again": str(double_kernel.configs[1])}
    assert "autotuned" in COMMANDS
