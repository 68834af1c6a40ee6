"""`python -m bench.micro --optimization NAME...`: forward plus backward of an op against PyTorch, checked first, then timed.

What does not match its reference is not timed, and what runs in Triton's interpreter is checked but not timed. With --record
the outcome, whatever it is, is kept under reports/data/micro and the reports are rendered.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loop.cli import guarded, parse
from loop.errors import UserError

if TYPE_CHECKING:
    import torch

    from abtest.opcheck import OpReport
    from bench.ceilings import Ceilings
    from kernels.contract import Optimization, Workload

INTERPRETED = "Triton's interpreter is not timed: it shows that a kernel is right, not how fast it is"


@dataclass(frozen=True)
class Command:
    """Flags of `python -m bench.micro`."""

    optimization: tuple[str, ...] = ()  # names of folders in kernels/ or negative_results/; one after another
    device: Literal["auto", "cpu", "cuda"] = "auto"
    samples: int = 50  # timed pairs a workload
    json: bool = False  # print the JSON lines only
    record: bool = False  # keep each result as a line of reports/data/micro/<device>.jsonl, and render the reports
    reports: Path = Path(__file__).resolve().parent.parent / "reports"  # with --record: the folder of reports


def run_micro(
    optimization: Optimization,
    device: torch.device,
    *,
    samples: int = 50,
    ceilings: Ceilings | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Checks every workload of `optimization` that fits `device`, and times them if all match and the device may be timed.

    Returns a mapping that JSON can hold: `level` and `reason` (the worst check), `untimed` (why there is no time, else
    None), `ceilings` (measured here unless given), and `workloads`, by name, with errors, times in microseconds of forward
    plus backward, of the candidate's forward alone, too, `ratio` (reference over candidate) and its 95 % interval, traffic,
    arithmetic, the fraction of the time floor that the ceilings set, and, where traffic sets it, the share that copies of as
    many bytes would take. The caller sets TRITON_INTERPRET.
    """
    from abtest.opcheck import SEEDS, check_op, workloads_for
    from abtest.verdict import Level
    from kernels.registry import unmet
    from loop.device import device_name

    say = on_progress or (lambda text: None)
    result: dict[str, Any] = {
        "optimization": optimization.name,
        "device": device_name(device),
        "exactness": optimization.exactness.value,
        "level": Level.NOT_RUN.value,
        "untimed": None,
        "ceilings": None,
        "workloads": {},
    }
    workloads = workloads_for(optimization.op, device) if optimization.op else []
    reason = unmet(optimization.needs, device) or _nothing_to_run(optimization, workloads, device)
    if reason:
        return result | {"reason": reason, "untimed": reason}
    rows: dict[str, dict[str, Any]] = {}
    worst = None
    for workload in workloads:
        say(f"{optimization.name}: checking {workload.name}")
        reports = [check_op(optimization.op, workload, device, seed, optimization.exactness) for seed in SEEDS]
        report = max(reports, key=_badness)
        worst = report if worst is None else max(worst, report, key=_badness)
        rows[workload.name] = _checked(workload, report)
    verdict = worst.verdict
    where = f"{worst.workload.name}, seed {worst.seed}: {verdict.reason}"
    result |= {"level": verdict.level.value, "reason": where, "workloads": rows}
    untimed = _why_untimed(optimization, device, worst)
    if untimed:
        return result | {"untimed": untimed}
    if ceilings is None:
        from bench.ceilings import measure_ceilings

        say("measuring what the device can do: copy bandwidth and matrix rate")
        ceilings = measure_ceilings(device)
    for workload in workloads:
        say(f"{optimization.name}: timing {workload.name}")
        rows[workload.name] |= _timed(optimization, workload, device, samples, ceilings)
    return result | {"ceilings": dataclasses.asdict(ceilings)}


def _nothing_to_run(optimization: Optimization, workloads: list[Workload], device: torch.device) -> str | None:
    if optimization.op is None:
        return "changes the whole loop and has no op of its own: only an A/B run can time it"
    return None if workloads else f"none of its workloads is small enough for {device.type}"


def _badness(report: OpReport) -> tuple[int, float]:
    """Orders reports from best to worst: by level, then by how much of the two limits is used."""
    from abtest.verdict import Level

    order = (Level.BITWISE, Level.ROUNDING, Level.APPROX, Level.NOT_RUN, Level.FAILED, Level.INVALID)
    used = [check.value / check.limit for check in report.verdict.checks if check.value is not None and check.limit]
    return order.index(report.verdict.level), max(used, default=0.0)


def _why_untimed(optimization: Optimization, device: torch.device, worst: OpReport) -> str | None:
    if not worst.passed:
        return f"not timed: {worst.verdict.level.value} on {worst.workload.name!r}: {worst.verdict.reason}"
    if optimization.needs.triton and device.type != "cuda":
        return INTERPRETED
    return None


def _checked(workload: Workload, report: OpReport) -> dict[str, Any]:
    shape = " ".join(f"{name}={size}" for name, size in workload.shape.items())
    values = {check.name: check.value for check in report.verdict.checks}
    return {
        "shape": shape,
        "dtype": workload.dtype,
        "small": workload.small,
        "level": report.verdict.level.value,
        "max_error_ratio": _json_number(values.get("max ratio")),
        "mean_error_ratio": _json_number(values.get("mean ratio")),
    }


def _json_number(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


def _timed(
    optimization: Optimization, workload: Workload, device: torch.device, samples: int, ceilings: Ceilings
) -> dict[str, Any]:
    from abtest.opcall import call
    from bench.timing import median_us, time_pair

    op = optimization.op
    inputs = op.inputs(workload, device, 0)
    reference, candidate = (forward_backward(side, inputs) for side in (op.reference, op.candidate))
    timing = time_pair(reference, candidate, device, samples)
    moved, flops = op.bytes_moved(workload), op.flops(workload)
    copies = copies_us(moved, device, samples) if ceilings.bound_by_bytes(moved, flops) else None
    seconds = timing.candidate_us / 1e6
    return {
        "reference_us": timing.reference_us,
        "candidate_us": timing.candidate_us,
        "ratio": timing.ratio,
        "ratio_low": timing.ratio_low,
        "ratio_high": timing.ratio_high,
        "samples": samples,
        "tb_per_s": moved / seconds / 1e12,
        "tflop_per_s": flops / seconds / 1e12,
        "of_ceiling": ceilings.floor_us(moved, flops) / timing.candidate_us,
        "forward_us": median_us(lambda: call(op.candidate, inputs), device, samples),
        "of_copies": None if copies is None else copies / timing.candidate_us,
    }


def copies_us(bytes_moved: int, device: torch.device, samples: int) -> float:
    """What copies take that move as many bytes in two launches, the fewest for a forward and a backward: of a few megabytes
    none reaches the bandwidth of large ones, since launching, filling and draining the device take microseconds."""
    from bench.ceilings import copy_of
    from bench.timing import median_us

    copy = copy_of(max(bytes_moved // 4, 4), device)  # of two copies, each of which reads and writes

    def both() -> None:
        copy()
        copy()

    return median_us(both, device, samples)


def forward_backward(function: Callable[..., Any], inputs: tuple[Any, ...]) -> Callable[[], None]:
    """One side of an op as a call without arguments: its forward and, where an input needs a gradient, its backward."""
    from abtest.opcall import call, gradients_of, input_names, leaves, random_gradients

    wanted = dict(leaves(input_names(function, inputs), inputs))
    incoming = random_gradients(call(function, inputs), seed=0)

    def step() -> None:
        gradients_of(call(function, inputs), wanted, incoming)

    return step


def table(result: Mapping[str, Any]) -> Any:
    """The rich table of a `run_micro` result."""
    from rich.table import Table

    title = f"{result['optimization']} on {result['device']}: forward + backward, {result['level']}"
    grid = Table(title=title, title_justify="left")
    for heading in ("workload", "shape", "dtype", "check"):
        grid.add_column(heading)
    numeric = (
        "max, mean error", "reference µs", "candidate µs", "forward µs", "ratio [95 %]", "TB/s", "TFLOP/s", "of ceiling",
        "of copies",
    )  # fmt: skip
    for heading in numeric:
        grid.add_column(heading, justify="right", no_wrap=True)
    for name, row in result["workloads"].items():
        grid.add_row(name, row["shape"], row["dtype"], row["level"], *_cells(row))
    return grid


def _cells(row: Mapping[str, Any]) -> list[str]:
    errors = (row["max_error_ratio"], row["mean_error_ratio"])
    cells = ["–" if None in errors else ", ".join(f"{float(error):.2f}×" for error in errors)]
    if "ratio" not in row:
        return [*cells, *["–"] * 8]
    return [
        *cells,
        f"{row['reference_us']:,.1f}",
        f"{row['candidate_us']:,.1f}",
        f"{row['forward_us']:,.1f}",
        f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]".replace("[", r"\["),
        f"{row['tb_per_s']:.3g}",
        f"{row['tflop_per_s']:.3g}",
        f"{row['of_ceiling']:.0%}",
        "–" if row["of_copies"] is None else f"{row['of_copies']:.0%}",
    ]


def _show(result: Mapping[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 180)
    if result["workloads"]:
        console.print(table(result))
        console.print(f"closest to a limit: {result['reason']}", markup=False, soft_wrap=True)
    if result["ceilings"]:
        top = result["ceilings"]
        copy, matmul = top["copy_bytes_per_s"] / 1e12, top["matmul_flops_per_s"] / 1e12
        measured = f"copy {copy:.3g} TB/s (read + written), {top['matmul_dtype']} {top['matmul_size']}³ {matmul:.3g} TFLOP/s"
        console.print(f"ceilings measured here: {measured}", markup=False)
    if result["untimed"]:
        console.print(result["untimed"], markup=False, soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    """Prints a table and, behind it, the result as a line of JSON, for one optimization after another. Returns 1 when a
    candidate does not match."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = parse(Command(), "python -m bench.micro", "Checks ops against PyTorch and times them.", arguments)
    import torch

    from bench.micro_records import recorder

    if command.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device on this machine; use --device cpu or auto")
    if command.samples < 2:
        raise UserError(f"--samples {command.samples}: an interval needs at least 2")
    device = torch.device("cuda" if torch.cuda.is_available() and command.device != "cpu" else "cpu")
    if device.type == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
    chosen = _chosen(command.optimization)
    record = recorder(device, command.reports, arguments) if command.record else None
    try:
        failed = _one_by_one(chosen, device, command, record.keep if record else lambda result: None)
    finally:  # what was measured before an interrupt is kept, and shown
        if record:
            record.render()
    for result in failed:
        print(f"error: {result['optimization']} {result['untimed']}", file=sys.stderr)
    return int(bool(failed))


def _chosen(names: tuple[str, ...]) -> list[Optimization]:
    from kernels.registry import discover

    known = discover()
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        asked = f"no optimization is named {unknown[0]!r}" if unknown else "name one"
        raise UserError(f"--optimization: {asked}; there are: {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]


def _one_by_one(
    chosen: list[Optimization], device: torch.device, command: Command, keep: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Measures, keeps and prints; what the device can do is measured once. Answers with the results that do not match."""
    from abtest.verdict import Level
    from bench.ceilings import Ceilings

    failed, ceilings = [], None
    for optimization in chosen:
        result = run_micro(optimization, device, samples=command.samples, ceilings=ceilings, on_progress=_say)
        if result["ceilings"]:
            ceilings = Ceilings(**result["ceilings"])
        keep(result)
        if not command.json:
            _show(result)
        print(json.dumps(result, ensure_ascii=False, allow_nan=False), flush=True)
        if result["level"] in (Level.FAILED.value, Level.INVALID.value):
            failed.append(result)
    return failed


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    guarded(main)
