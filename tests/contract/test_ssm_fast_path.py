"""ssm_fast_path: which Triton it refuses, and what its op compares with. FLA itself needs a GPU."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from abtest.opcheck import check_op
from abtest.verdict import Level
from kernels import registry
from kernels.contract import Exactness, Needs
from kernels.ssm_fast_path import OPTIMIZATION
from kernels.ssm_fast_path.patch import eligible, known_wrong, triton_refusal
from loop.delta_net import PackedDeltaNet

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HOPPER, AMPERE, ADA, DATACENTER_BLACKWELL, BLACKWELL = (9, 0), (8, 0), (8, 9), (10, 0), (12, 0)


@pytest.mark.parametrize("version", [(3, 4, 0), (3, 4, 1), (3, 5, 1), (3, 6, 0), (3, 7, 0)], ids=str)
def test_refuses_triton_that_is_wrong_on_hopper(version):
    reason = triton_refusal(HOPPER, version)
    assert ".".join(map(str, version)) in reason and "640" in reason and "3.7.1" in reason
    for capability in (AMPERE, ADA, DATACENTER_BLACKWELL, BLACKWELL):
        assert triton_refusal(capability, version) is None


@pytest.mark.parametrize("version", [(3, 2, 0), (3, 3, 1), (3, 7, 1), (3, 8, 0), (4, 0, 0)], ids=str)
def test_allows_triton_that_is_right_on_hopper(version):
    assert triton_refusal(HOPPER, version) is None


@pytest.mark.parametrize(
    ("installed", "refused"),
    [("3.6.0", True), ("3.7.0+git1a2b3c", True), ("3.7.1", False), ("3.7.1+cu130", False), ("3.3.1", False)],
)
def test_reads_the_version_that_is_installed(monkeypatch, installed, refused):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", installed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: HOPPER)
    assert (known_wrong(CUDA) is not None) is refused


def test_the_refusal_reaches_everything_that_asks_what_is_missing():
    needs = Needs(known_wrong=lambda device: f"wrong on {device.type}")
    assert registry.unmet(needs, CUDA) == "wrong on cuda"
    assert registry.unmet(needs, CPU) is None
    assert OPTIMIZATION.needs.known_wrong is known_wrong
    assert registry.unmet(OPTIMIZATION.needs, CPU) == "needs a CUDA device; this run is on cpu"


def test_needs_layers_on_the_pytorch_path():
    reason = eligible(SimpleNamespace(model=nn.Linear(2, 2)))
    assert reason == "the model has no gated-delta layers on the PyTorch path"
    layer = PackedDeltaNet(nn.Linear(2, 2))
    assert eligible(SimpleNamespace(model=nn.Sequential(layer))) is None


def small_workloads():
    return [replace(w, dtype="float32") for w in OPTIMIZATION.op.workloads if w.small]


@pytest.mark.parametrize("workload", small_workloads(), ids=lambda w: w.name)
def test_the_reference_keeps_documents_apart(workload):
    reference = OPTIMIZATION.op.reference
    *tensors, pack = OPTIMIZATION.op.inputs(workload, CPU, 0)
    assert sum(pack.lengths) == workload.shape["T"]
    whole = reference(*tensors, pack)
    assert whole.shape == (1, *tensors[2].shape[1:]) and whole.dtype == torch.float32
    start = 0
    for length in pack.lengths:
        one = replace(pack, cu_seqlens=torch.tensor([0, length], dtype=torch.int32), lengths=(length,))
        alone = reference(*(x[:, start : start + length] for x in tensors), one)
        torch.testing.assert_close(whole[:, start : start + length], alone, rtol=1e-5, atol=1e-6)
        start += length


def test_the_op_check_sees_state_that_leaks_between_documents():
    def leaking(q, k, v, g, beta, pack):
        joined = replace(pack, cu_seqlens=pack.cu_seqlens[[0, -1]], lengths=(sum(pack.lengths),))
        return OPTIMIZATION.op.reference(q, k, v, g, beta, joined)

    workload = small_workloads()[1]
    op = OPTIMIZATION.op
    same = check_op(replace(op, candidate=op.reference), workload, CPU, exactness=Exactness.BITWISE)
    assert same.verdict.level is Level.BITWISE
    assert check_op(replace(op, candidate=leaking), workload, CPU).verdict.level is Level.FAILED


def test_least_work_grows_with_tokens_alone():
    op, (workload, *_) = OPTIMIZATION.op, OPTIMIZATION.op.workloads
    twice = replace(workload, shape=dict(workload.shape) | {"T": 2 * workload.shape["T"]})
    assert op.flops(twice) == 2 * op.flops(workload) > 0
    assert op.bytes_moved(twice) == 2 * op.bytes_moved(workload) > 0
