"""Each defect that sits in one op, planted in that op alone: beside fp64 it shows at every strength, and the op does not.

A whole run dilutes a defect in one of many layers, and what it moves may be less than bf16 moves anyway. Here its op is
judged by itself, in bf16 where it can be told from rounding there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from planted_op import changed_part, check_planted, check_without
from tiny import tiny

from abtest.catalogue import Case, cases, catalogue
from abtest.catalogue.op_level import NAMES, OP_LEVEL_TESTS
from abtest.catalogue.patching import pick
from abtest.report.op_level import op_level_tests
from abtest.verdict import Level
from loop.lora import Adapter, adapters
from loop.run import Run

ROOT = Path(__file__).resolve().parents[2]
KNOWN = catalogue()
# In bf16 three have no effect by their own account; the fourth's 3 % of a wrong saved value can't be told from rounding.
FP32 = ("a_log_rounded", "logits_rounded", "tf32_input", "gated_norm_dw")
ONLY_BF16_LET_THROUGH = (
    "accumulated_in_fewer_bits:all:16", "head_dw_in_fewer_bits:all:16", "lora_dx_incomplete:first:0.1",
    "norm_dw_in_bf16:first:8", "rope_angles_rounded:first:13", "true_class_rounded:all:15",
)  # fmt: skip  # survivors of the first run on a GPU
HARMLESS = {"norm_dw_in_bf16": 1.0}  # one block of rows: a single rounding to bf16, as stock's
SEEN_BY = {"max ratio", "mean ratio", "gradients"}  # and not by what a broken test would trip over
RUN_ONLY = ("cheats", "graphs_backends")  # families that need a run to show


def dtype_of(name: str) -> str:
    return "float32" if name in FP32 else "bfloat16"


@pytest.mark.parametrize("name", NAMES)
def test_the_defect_shows_in_its_op(name: str, one_thread) -> None:
    for case in cases(KNOWN[name]):
        verdict = check_planted(case, dtype_of(name)).verdict
        failed = {check.name for check in verdict.checks if not check.passed}
        assert verdict.level is Level.FAILED and failed & SEEN_BY, f"{case.id}: {verdict.reason}"


@pytest.mark.parametrize("name", NAMES)
def test_its_op_without_the_defect_passes(name: str, one_thread) -> None:
    report = check_without(cases(KNOWN[name])[0], dtype_of(name))
    assert report.verdict.level is Level.BITWISE, report.verdict.reason
    assert len(report.quantities) > 1


@pytest.mark.parametrize("case_id", ONLY_BF16_LET_THROUGH)
def test_without_strength_the_same_patch_passes(case_id: str, one_thread) -> None:
    """It is the defect that shows, not what the patch does besides: other positions, a sum in blocks, another backward."""
    name, layer, _ = case_id.split(":")
    case = Case(KNOWN[name], layer, HARMLESS.get(name, 0.0))
    for dtype in ("float32", "bfloat16") if name not in ("norm_dw_in_bf16", "rope_angles_rounded") else ("bfloat16",):
        report = check_planted(case, dtype)
        assert report.passed, f"{dtype}: {report.verdict.reason}"


@pytest.mark.parametrize("case_id", ONLY_BF16_LET_THROUGH)
@pytest.mark.parametrize("seed", [1, 2])
def test_what_the_gate_let_through_shows_whatever_the_seed(case_id: str, seed: int, one_thread) -> None:
    name, layer, magnitude = case_id.split(":")
    assert not check_planted(Case(KNOWN[name], layer, float(magnitude)), "bfloat16", seed).passed


@pytest.mark.parametrize("micro_steps", [4.0, 1000.0])
def test_a_copy_of_a_weight_shows_once_the_weight_moves(micro_steps: float, one_thread) -> None:
    """A defect that keeps a state: its adapter alone, called again and again while A moves, beside the same one without."""
    sides = [alone(tiny("qwen3.5-tiny", method="lora")[0]) for _ in range(2)]
    Case(KNOWN["lora_db_from_stale_a"], "first", micro_steps).apply(sides[0][0])
    same = [torch.equal(*(moved_db(run, adapter, turn) for run, adapter in sides)) for turn in range(6)]
    assert same[0] and not all(same)


def alone(run: Run) -> tuple[Run, Adapter]:
    """A run whose micro-step is nothing but the adapter that a case picks as the first one, on a random input."""
    found = {adapter.name: adapter for adapter in adapters(run.model)}
    adapter = found[pick(found, "first")]
    x = torch.randn(1, 32, adapter.a.shape[1], generator=torch.Generator().manual_seed(0))

    def micro_step(run: Run, batch: None, tokens: int) -> torch.Tensor:
        loss = run.model.get_submodule(adapter.name)(x).square().sum()
        loss.backward()
        return loss.detach()

    run.micro_step = micro_step
    return run, adapter


def moved_db(run: Run, adapter: Adapter, turn: int) -> torch.Tensor:
    """dB of one micro-step, for which A has grown a little since the one before."""
    with torch.no_grad():
        adapter.a.mul_(1 + 0.01 * (turn > 0))
    run.micro_step(run, None, 1)
    gradient = run.optimizer.gradients()[f"{adapter.name}.lora_B.weight"].clone()
    run.optimizer.zero_grad()
    return gradient


def test_no_defect_of_one_op_is_left_out(one_thread) -> None:
    own = [planted for planted in KNOWN.values() if planted.kind == "mutant" and planted.family not in RUN_ONLY]
    assert {*NAMES} <= {planted.name for planted in own}
    for planted in own:
        if planted.name not in NAMES:
            with pytest.raises(ValueError, match=r"optimizer|run\.micro_step: not one"):
                changed_part(cases(planted)[0], "float32")


def test_every_test_that_is_named_exists() -> None:
    assert op_level_tests() == OP_LEVEL_TESTS and {*OP_LEVEL_TESTS} == {*NAMES, "lora_db_from_stale_a"}
    files = sorted({test.partition("::")[0] for test in OP_LEVEL_TESTS.values()})
    words = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(words, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120, check=True)
    assert {*OP_LEVEL_TESTS.values()} <= {*done.stdout.splitlines()}
