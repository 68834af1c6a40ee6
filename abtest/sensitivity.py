"""`python -m abtest.sensitivity`: judges the judge.

Plants every defect of the catalogue, and every honest rewrite with eight seeds, on a small model, puts each through the
whole gate, and publishes which checks caught what: `reports/gate/README.md`, from `reports/data/gate/<device>.jsonl`.

Calibration and hold-out differ in seeds (so in weights, data order and probes), in states and in mutants: limits may be set
by looking at the first half, and are judged by the second.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from abtest import limits
from abtest.catalogue import Case, Planted, cases, catalogue
from abtest.command import check_gate, command_line, gate_config, gate_recipe
from abtest.environment import describe
from abtest.mps import shared_gpu
from abtest.report import render, write_sensitivity
from abtest.settings import GateConfig
from abtest.unit_store import UnitStore, identity
from abtest.units import Unit, run_unit
from loop.cli import guarded, parse
from loop.config import Config, DataConfig, LoraConfig
from loop.errors import UserError
from loop.model import resolve_device

ROOT = Path(__file__).resolve().parent.parent
SCALES = (0.0003, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.01)  # of the sweep, relative errors of one projection
SWEPT = ("lora_scale_off", "down_projection_off")  # the mutants whose magnitude is such an error


@dataclass(frozen=True)
class Command(Config):
    """Flags of `python -m abtest.sensitivity`."""

    methods: tuple[str, ...] = ("lora", "full")  # seeds take turns in them
    every_method: bool = False  # every seed and every defect in each method, which takes as many times as long
    seeds: int = 8  # of the honest rewrites; the first half are calibration, the second half hold-out
    first_seed: int = 0  # limits that were set after a look at one hold-out need another: seeds that nobody has seen
    only: tuple[str, ...] = ()  # names or families of the catalogue; empty: all of it
    carrier: tuple[str, ...] = ("auto",)  # on in every arm; auto: ssm_fast_path on CUDA, none elsewhere
    sweep: bool = True  # look for the smallest scale error of one projection that is caught
    processes: int = 0  # gates at a time, by turns on all GPUs; 0: one a core, at most 8 a GPU
    pieces: int = 1  # that every seed's cases are cut into, each with a reference of its own: more processes than seeds
    units: Path = Path(".cache/isoloss/sensitivity")  # finished units of a run that was cut; the next run goes on from them
    gate: GateConfig = field(default_factory=GateConfig)
    reports: Path = ROOT / "reports"


def main(argv: list[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    default = Command(lora=LoraConfig(rank=8, alpha=16.0), data=DataConfig(pack_length=192), grad_accum=2)
    command = parse(
        default, "python -m abtest.sensitivity", "Plants defects and honest rewrites, and gates them.", arguments
    )
    check_gate(command)
    device, dtype = resolve_device(command)
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    command = dataclasses.replace(command, device=device.type, dtype=str(dtype).removeprefix("torch."))
    planned = plan(command, device)
    began, started = time.monotonic(), _now()
    environment = describe(device)
    store = UnitStore(command.units, identity(environment))
    count = processes(command, device)
    with shared_gpu(device.type == "cuda" and count > 1) as variables:
        os.environ |= variables  # for the processes that are started; this one has had its look at the GPU
        lines, sweep = run_units(planned, count, store)
    facts = {
        "run_id": f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{(environment['git_sha'] or 'nogit')[:7]}",
        "command": command_line("abtest.sensitivity", arguments),
        "environment": environment, "recipe": gate_recipe(command), "carrier": list(carrier(command, device)),
        "limits": {name: value for name, value in vars(limits).items() if name.isupper() and isinstance(value, float)},
        "started": started, "finished": _now(), "seconds": time.monotonic() - began,
    }  # fmt: skip
    write_sensitivity(command.reports / "data", environment["device_slug"], lines, facts, sweep)
    render(command.reports / "data", command.reports)
    store.clear(planned)
    print(json.dumps(summary(lines)))
    return 0


def plan(command: Command, device: torch.device) -> list[Unit]:
    """One unit a method and seed: a reference of its own, every honest rewrite, and its share of the defects."""
    chosen = [
        planted for planted in catalogue().values() if not command.only or {planted.name, planted.family} & set(command.only)
    ]
    if not chosen:
        raise UserError(f"--only {' '.join(command.only)}: nothing in the catalogue has such a name or family")
    half = command.seeds // 2
    if (half < len(command.methods) and not command.every_method) or half < 1:
        raise UserError(f"--seeds {command.seeds}: calibration and hold-out each need one for every method")
    if command.first_seed < 0:
        raise UserError(f"--first-seed {command.first_seed}: 0 or more is expected")
    if command.pieces < 1:
        raise UserError(f"--pieces {command.pieces}: at least 1 is expected")
    wrong = [method for method in command.methods if method not in ("lora", "full")]
    if wrong or not command.methods:
        raise UserError(f"--methods {' '.join(wrong)}: lora or full is expected")
    defects = share_out([planted for planted in chosen if planted.kind == "mutant"], command)
    units = []
    for method, seed in places(command):
        config = dataclasses.replace(gate_config(command, command.gate), method=method, seed=seed)
        settings = dataclasses.replace(command.gate, seed=seed, parallel=1)
        benign = [
            case.id
            for planted in chosen
            if planted.kind == "benign" and method in planted.methods
            for case in cases(planted)
        ]
        number = seed - command.first_seed
        first = number < len(command.methods) or half <= number < half + len(command.methods)
        swept = sweep_cases(method) if command.sweep and not command.only and first else []
        split = "calibration" if number < half else "holdout"
        own = defects.get((method, seed), [])
        whole = Unit(config, settings, carrier(command, device), split, tuple(benign), tuple(own), tuple(swept))
        units += pieces_of(whole, command.pieces)
    return units


def pieces_of(unit: Unit, count: int) -> list[Unit]:
    """The unit's cases dealt out to `count` units, fewer where there are not enough of them."""
    kinds = ("benign", "mutants", "swept")
    dealt = [(kind, case) for kind in kinds for case in getattr(unit, kind)]
    hands = [dealt[index::count] for index in range(min(count, len(dealt)))]
    return [
        dataclasses.replace(unit, **{kind: tuple(case for own, case in hand if own == kind) for kind in kinds})
        for hand in hands
    ]


def places(command: Command) -> list[tuple[str, int]]:
    """The methods and seeds that get a reference: every pair of them, or each seed in one method by turns."""
    seeds = range(command.first_seed, command.first_seed + command.seeds)
    if command.every_method:
        return [(method, seed) for method in command.methods for seed in seeds]
    return [(command.methods[index % len(command.methods)], seed) for index, seed in enumerate(seeds)]


def share_out(mutants: list[Planted], command: Command) -> dict[tuple[str, int], list[str]]:
    """Which cases go where: calibration mutants to the first half of the seeds, hold-out mutants to the second, spread
    evenly; each case once, or once for every method in which it has an effect."""
    half, held_out = command.first_seed + command.seeds // 2, holdout([planted.name for planted in mutants])
    out: dict[tuple[str, int], list[str]] = {}
    counts: dict[tuple[str, bool], int] = {}
    for index, planted in enumerate(mutants):
        side = planted.name in held_out
        methods = [method for method in command.methods if method in planted.methods]
        for number, case in enumerate(cases(planted) if methods else ()):
            turn = (index + number + number // len(methods)) % len(methods)  # not every small magnitude to one method
            for method in methods if command.every_method else [methods[turn]]:
                own = [seed for m, seed in places(command) if m == method and (seed >= half) == side]
                count = counts.get((method, side), 0)
                out.setdefault((method, own[count % len(own)]), []).append(case.id)
                counts[method, side] = count + 1
    return out


def holdout(names: list[str]) -> set[str]:
    """Every second mutant in the order of the alphabet."""
    return set(sorted(names)[1::2])


def sweep_cases(method: str) -> list[str]:
    known = catalogue()
    swept = [known[name] for name in SWEPT if method in known[name].methods]
    return [Case(planted, layer, scale).id for planted in swept for layer in planted.layers for scale in SCALES]


def carrier(command: Command, device: torch.device) -> tuple[str, ...]:
    if command.carrier == ("auto",):
        return ("ssm_fast_path",) if device.type == "cuda" and command.model.startswith("qwen3.5") else ()
    return tuple(name for name in command.carrier if name != "none")


def processes(command: Command, device: torch.device) -> int:
    if command.processes:
        return command.processes
    cores = len(os.sched_getaffinity(0))
    return min(cores, 8 * max(len(gpus()), 1)) if device.type == "cuda" else cores


def run_units(units: list[Unit], workers: int, store: UnitStore) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every unit that `store` lacks in a process of its own, `workers` at a time; all lines in the order of the units."""
    context = multiprocessing.get_context("spawn")
    turn = context.Value("i", 0)
    done = {index: kept for index, unit in enumerate(units) if (kept := store.get(unit)) is not None}
    if done:
        print(f"{len(done)} of {len(units)} units were finished by an earlier run", file=sys.stderr, flush=True)
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="isoloss-") as scratch,
        ProcessPoolExecutor(workers, mp_context=context, initializer=begin_worker, initargs=(turn, gpus())) as pool,
    ):
        running = {
            pool.submit(run_unit, unit, Path(scratch) / str(index)): index
            for index, unit in enumerate(units)
            if index not in done
        }
        for future in as_completed(running):
            index = running[future]
            done[index] = future.result()
            store.put(units[index], done[index])
            _tell(f"[{time.monotonic() - began:5.0f} s] {len(done)}/{len(units)}", units[index], done[index][0])
    ordered = [done[index] for index in sorted(done)]
    return [line for lines, _ in ordered for line in lines], [line for _, sweep in ordered for line in sweep]


def gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(named.split(",")) if named else tuple(map(str, range(torch.cuda.device_count())))


def begin_worker(turn: Any, names: tuple[str, ...]) -> None:
    """In a worker of the pool: it ends with the command, which may be killed, and would else work on for nobody."""
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    take_gpu(turn, names)


def _end_with_the_command() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def take_gpu(turn: Any, names: tuple[str, ...]) -> None:
    """In a worker of the pool, before anything uses CUDA: the workers share the GPUs by turns."""
    if len(names) < 2:
        return
    with turn.get_lock():
        os.environ["CUDA_VISIBLE_DEVICES"] = names[turn.value % len(names)]
        turn.value += 1


def _tell(prefix: str, unit: Unit, lines: list[dict[str, Any]]) -> None:
    """A finished unit in one line on stderr, and every false alarm and survivor with its reason."""
    wrong = [line for line in lines if line["caught"] == (line["kind"] == "benign") and not line["equivalent"]]
    alarms = sum(line["caught"] for line in wrong)
    defects = sum(line["caught"] for line in lines if line["kind"] == "mutant")
    print(
        f"{prefix} {unit.config.method}, seed {unit.config.seed}: {len(lines)} gates, {defects} defects caught, "
        f"{alarms} false alarms",
        file=sys.stderr,
    )
    for line in wrong:
        what = "false alarm" if line["caught"] else "survivor"
        print(f"    {what}: {line['name']}:{line['layer']}:{line['magnitude']:g}: {line['reason']}", file=sys.stderr)
    sys.stderr.flush()


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What the last line on stdout says."""
    out: dict[str, Any] = {}
    for split in ("calibration", "holdout"):
        own = [line for line in lines if line["split"] == split and line["kind"] == "mutant" and not line["equivalent"]]
        out[split] = {"mutants": len(own), "caught": sum(line["caught"] for line in own)}
    benign = [line for line in lines if line["kind"] == "benign"]
    alarms = [f"{line['name']} ({line['method']}, seed {line['seed']})" for line in benign if line["caught"]]
    survivors = [line for line in lines if line["kind"] == "mutant" and not line["equivalent"] and not line["caught"]]
    return out | {
        "benign": len(benign), "false_alarms": alarms,
        "survivors": sorted(f"{s['name']}:{s['layer']}:{s['magnitude']:g} ({s['method']})" for s in survivors),
    }  # fmt: skip


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


if __name__ == "__main__":
    guarded(main)
