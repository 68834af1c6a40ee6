"""Synthetic gate records and outcomes of a sensitivity run, for the tests of reports."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import synthetic_records as synthetic
from rendered import tables

from abtest.report import GateRecord, append_gate, render, write_sensitivity
from abtest.verdict import Check, Level, Verdict

SLUG = "example-gpu-x1"
RHO = "gradient error ratio, worst parameter"
LOSS = "loss, worst step (sigma)"
APART = "editing a document leaves the loss of the others unchanged"
WIRE = "the tripwire turns the gate red"
LIMITS = {"RHO": 1.5, "GEOMEAN": 1.15, "LOSS_SIGMA": 6.0, "UPDATE": 1e-5}
CHECKS = (
    Check("the reference repeats itself bitwise", None, None, True, "", 1),
    Check("reference close to the oracle", 0.031, 0.15, True, "", 1, "step 0"),
    Check("share of parameters with a gradient", 0.97, 0.4, True, "", 1, "step 0"),
    Check(RHO, 1.21, 1.5, True, "model.layers.3.mlp.down_proj.weight", 2, "step 0"),
    Check(RHO, 1.02, 1.5, True, "model.layers.0.mlp.up_proj.weight", 2, "step 29"),
    Check("update beside fp64 AdamW", 2e-7, 1e-5, True, "model.norm.weight", 3),
    Check(LOSS, 2.1, 6.0, True, "step 17", 4),
    Check(APART, None, None, True, "", 5),
    Check("op checks that fail", 0.0, 0.0, True),
)


def trace() -> tuple[dict[str, Any], ...]:
    places = ["embed_tokens", *(f"layers.{i}{part}" for i in range(4) for part in (".mlp", "")), "norm"]
    rows = []
    for phase, order in (("forward", places), ("backward", places[::-1])):
        for index, place in enumerate(order):
            far = 0.0 if index < 3 else 1e-3 * 1.6 ** (index - 3)
            rows.append({
                "module": f"model.{place}", "phase": phase, "same_bits": far == 0.0, "relative": far, "beside": 2e-3,
            })  # fmt: skip
    return tuple(rows)


def gate_record(name: str = "silu_mul", level: Level = Level.ROUNDING, **changes: Any) -> GateRecord:
    arm = synthetic.record(name, level)
    values = {
        "run_id": "20260102T030405Z-0123abc",
        "command": f"python -m abtest.run --optimization {name}",
        "finished_at": "2026-01-02T03:04:05Z",
        "environment": synthetic.ENVIRONMENT,
        "recipe": synthetic.RECIPE | {"gate": {"steps": 30, "replicas": 8}},
        "data": synthetic.DATA,
        "name": name,
        "optimizations": (name,),
        "planted": None,
        "claim": "rounding",
        "summary": f"what {name} does",
        "why_exact": "the same products, summed in another order",
        "verdict": Verdict(level, f"{LOSS} 2.1 of at most 6 (step 17)", CHECKS),
        "losses": arm.losses,
        "reference_losses": arm.reference_losses,
        "noise_sigma": arm.noise_sigma,
        "trace": trace(),
        "census": {
            "reference": {"operators": {"aten::mm": 40, "aten::silu": 4, "aten::mul": 9}, "kernels": {"gemm": 40}},
            "candidate": {"operators": {"aten::mm": 40, "isoloss::silu_mul": 4, "aten::mul": 5}, "kernels": {"gemm": 40}},
            "new": ["isoloss::silu_mul x4"],
            "gone": ["aten::silu -4", "aten::mul -4"],
        },
        "op": (
            {"op": "silu_mul", "workload": "hidden", "seed": 1, "level": "ROUNDING", "reason": "max ratio 1 of at most 2"},
            {"workload": "ragged", "seed": 2, "level": "FAILED", "reason": "mean ratio 1.3 of at most 1.1"},
        ),
        "autotune": {"silu_mul_forward": {"BLOCK": 1024, "num_warps": 4}},
        "seconds": {"prepare": 120.5, "candidate": 61.25, "total": 190.0},
        "notes": ("a_note",),
    }
    return GateRecord(**(values | changes))


def line(name: str = "scaled", caught_by: tuple[str, ...] = (RHO,), **changes: Any) -> dict[str, Any]:
    values = {
        "kind": "mutant", "name": name, "family": "lora", "layer": "first", "magnitude": 0.01, "seed": 0,
        "equivalent": False, "caught": bool(caught_by), "caught_by": list(caught_by), "split": "holdout", "method": "lora",
        "level": "FAILED" if caught_by else "ROUNDING", "reason": "why", "modelled_on": f"bug behind {name}", "unit": "",
        "values": {RHO: 2.5 if RHO in caught_by else 1.1, LOSS: 12.0 if LOSS in caught_by else 0.9},
    }  # fmt: skip
    return values | changes


def benign(name: str = "summed_backwards", rho: float = 1.2, **changes: Any) -> dict[str, Any]:
    base = {"kind": "benign", "family": "benign", "magnitude": 0.0, "values": {RHO: rho, LOSS: 0.5}}
    return line(name, (), **(base | changes))


def outcome() -> list[dict[str, Any]]:
    """On hold-out 9 of 10 caught, one of them by preflight alone; on calibration 2 of 2; one equivalent; no false alarm."""
    held = [line("scaled", (RHO,), layer=layer, magnitude=m) for layer in ("first", "last") for m in (0.01, 0.1)]
    held += [line("leak", (RHO, APART), family="packing", layer=layer) for layer in ("first", "last")]
    held += [line("stale", (LOSS,), family="cheats", seed=5, method="full"), line("sleeper", (WIRE,), family="cheats")]
    held += [line("quiet", (), family="packing", values={RHO: 1.48, LOSS: 3.0, "recurrence": math.nan})]
    held += [line("quiet", (RHO,), family="packing", magnitude=0.1), line("nothing", (), family="lora", equivalent=True)]
    first = [line("doubled", (RHO, LOSS), split="calibration"), line("doubled", (RHO,), split="calibration", layer="last")]
    honest = [benign(seed=seed, rho=1 + seed / 20, split="calibration" if seed < 4 else "holdout") for seed in range(8)]
    return held + first + honest


def sweep_of_places() -> list[dict[str, Any]]:
    return [
        {"where": where, "method": "lora", "scale": scale, "caught": scale >= edge, "caught_by": [RHO] * (scale >= edge),
         "seed": seed}
        for where, edge in (("lora_scaled, first", 0.001), ("lora_scaled, last", 0.003))
        for scale in (0.0005, 0.001, 0.003)
        for seed in (0, 4)
    ]  # fmt: skip


def facts(**changes: Any) -> dict[str, Any]:
    values = {
        "run_id": "20260103T000000Z-0123abc", "command": "python -m abtest.sensitivity",
        "environment": synthetic.ENVIRONMENT, "recipe": synthetic.RECIPE | {"gate": {"steps": 30}},
        "carrier": ["ssm_fast_path"], "limits": LIMITS,
        "started": "2026-01-03T00:00:00Z", "finished": "2026-01-03T00:30:00Z", "seconds": 1800.0,
    }  # fmt: skip
    return values | changes


def measured(reports: Path, lines=None, sweep=None, **changes) -> Path:
    write_sensitivity(
        reports / "data", SLUG, outcome() if lines is None else lines, facts(**changes),
        sweep_of_places() if sweep is None else sweep,
    )  # fmt: skip
    return reports / "data"


def table(markdown: str, first: str) -> list[list[str]]:
    """The rows of the first table that has this cell in its header."""
    return next(rows for rows in tables(markdown) if first in rows[0])


def rendered(reports: Path) -> Path:
    """A report with both kinds of data, and an arm that failed."""
    measured(reports)
    append_gate(reports / "data", SLUG, gate_record())
    failed = Verdict(Level.FAILED, "31.7 sigma", (*CHECKS[:6], Check(LOSS, 31.7, 6.0, False, "step 3", 4)))
    append_gate(reports / "data", SLUG, gate_record("broken", Level.FAILED, verdict=failed, trace=(), op=()))
    render(reports / "data", reports)
    return reports
