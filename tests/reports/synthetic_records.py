"""Synthetic records for the tests of reports: every level, with and without times."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from abtest.verdict import Check, Level, Verdict
from bench.records import Perf, Record

STEPS = 30
REFERENCE_LOSSES = tuple(6.1 * math.exp(-0.06 * step) + 1.2 + 0.15 * math.sin(1.7 * step) for step in range(STEPS))
SIGMA = tuple(2e-4 * (1 + 0.1 * step) for step in range(STEPS))
ENVIRONMENT = {
    "device": "Example GPU X1",
    "device_slug": "example-gpu-x1",
    "dtype": "bfloat16",
    "driver": "570.1",
    "clocks": {"sm_mhz": 1980, "memory_mhz": 2619},
    "versions": {"torch": "2.11.0", "triton": "3.7.1"},
    "git_sha": "0123abc",
    "git_dirty": False,
    "total_memory_bytes": 80 * 2**30,
    "matmul_flops_per_s": 6.712e14,
    "paths": {"attention": "sdpa", "delta_rule": "pure PyTorch"},
}
RECIPE = {
    "model": "qwen3.5-tiny",
    "method": "lora",
    "dtype": "auto",
    "steps": STEPS,
    "lora": {"rank": 16, "alpha": 32.0},
    "data": {"pack_length": 512},
    "output": None,
}
DATA = {"documents": 12345, "packs": 40, "skipped": {"longer than the pack": 2}, "supervised_fraction": 0.4567}


def perf(ratio: float = 1.2, width: float = 0.02, **changes: Any) -> Perf:
    values = {
        "positions_per_s": 1800.0 * ratio,
        "real_tokens_per_s": 1699.4 * ratio,
        "supervised_tokens_per_s": 777.7 * ratio,
        "micro_step_ms": 284.4 / ratio,
        "ratio": ratio,
        "ratio_low": ratio - width,
        "ratio_high": ratio + width,
        "blocks": 24,
        "peak_memory_bytes": int(22.5 * 2**30),
        "mfu": 0.314,
        "launches": 1234,
    }
    return Perf(**(values | changes))


def verdict(level: Level, reason: str = "largest loss difference 2.1 sigma, limit 6", failed: bool | None = None) -> Verdict:
    failed = not level.lossless if failed is None else failed
    checks = (
        Check("loss, largest difference in sigma", 31.7 if failed else 2.1, 6.0, not failed, "step 17"),
        Check("gradient error over the reference's", 1.01, 1.1, True, "model.layers.0.mlp.down_proj.weight"),
    )
    return Verdict(level, reason, () if level is Level.NOT_RUN else checks)


def record(arm: str = "silu_mul", level: Level = Level.ROUNDING, **changes: Any) -> Record:
    role = changes.get("role", "optimization")
    optimizations = {"optimization": (arm,), "combination": ("silu_mul", "static_lora")}.get(role, ())
    wobble = 0.0 if level is Level.BITWISE else 1.0
    values = {
        "run_id": "20260102-030405-ab12",
        "arm": arm,
        "role": role,
        "optimizations": optimizations,
        "verdict": verdict(level),
        "summary": f"what {arm} does",
        "exactness": "bitwise" if level is Level.BITWISE else "rounding",
        "why_exact": "the same products, summed in another order",
        "environment": ENVIRONMENT,
        "recipe": RECIPE,
        "data": DATA,
        "command": "python -m bench.run --steps 30",
        "finished_at": "2026-01-02T03:04:05Z",
        "losses": tuple(
            loss + wobble * sigma * 1.9 * math.sin(2.9 * step)
            for step, (loss, sigma) in enumerate(zip(REFERENCE_LOSSES, SIGMA, strict=True))
        ),
        "reference_losses": REFERENCE_LOSSES,
        "noise_sigma": SIGMA,
    }
    return Record(**(values | changes))


def reference(**changes: Any) -> Record:
    return dataclasses.replace(record("stock", Level.BITWISE, role="reference", perf=perf(1.0, 0.004)), **changes)


def full_run() -> list[Record]:
    """One run with every role and level."""
    nothing = {"losses": (), "reference_losses": (), "noise_sigma": ()}
    apart = tuple(loss + 0.004 * step**2 for step, loss in enumerate(REFERENCE_LOSSES))
    broken = (*REFERENCE_LOSSES[:12], math.inf, *[math.nan] * 6)
    return [
        reference(),
        record("static_lora", Level.BITWISE, perf=perf(1.11, 0.01)),
        record("silu_mul", perf=perf(1.06, 0.02), micro={"speedup": 1.8, "worst_error": 3e-7}, notes=("a_note", "b|c")),
        record("fused_norm", perf=perf(1.003, 0.012)),
        record("slow_path", perf=perf(0.82, 0.03)),
        record("gated_only", untimed="Triton's interpreter is not timed"),
        record("half_precision", Level.APPROX, verdict=verdict(Level.APPROX, "another function, by design", False)),
        record("wrong_backward", Level.FAILED, losses=apart, verdict=verdict(Level.FAILED, "31.7 sigma, limit 6")),
        record("diverges", Level.FAILED, losses=broken, verdict=verdict(Level.FAILED, "loss is not finite at step 13")),
        record("noisy", Level.INVALID, verdict=verdict(Level.INVALID, "two references differ: 0.1 at step 3")),
        record("needs_fla", Level.NOT_RUN, verdict=verdict(Level.NOT_RUN, "fla is not installed"), **nothing),
        record("all", role="combination", perf=perf(1.23, 0.02, peak_memory_bytes=20 * 2**30)),
        record("peft_fla", role="peer", perf=perf(1.17, 0.02)),
    ]
