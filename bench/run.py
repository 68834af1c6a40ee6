"""`python -m bench.run`: gates every optimization against stock, times what passed, and writes the report.

One run may take several commands: `--run ID` goes on with what the run has no record of, also in several processes at the
same time, each on a GPU of its own. Stock is prepared and timed in every command, because ratios are taken within one.
The last line on stdout is one JSON document with every arm's verdict and numbers; everything else goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch

from abtest import template
from abtest.command import gate_config
from abtest.environment import describe
from abtest.experiment import Experiment
from abtest.mps import environment_of_arms, joined, shared_gpu
from abtest.progress import GateProgress
from bench.budget import Budget
from bench.ceilings import measure_ceilings
from bench.claims import Claims, alone_in
from bench.command import Command, check, default, facts_of, new_run_id, recipe_of, records_file
from bench.ledger import Ledger
from bench.measure import Bench, goes_beside, side_by_side
from bench.plan import ArmPlan, arm_units, plan_arms, planned_units
from bench.report import render, summary_json
from bench.turns import Turns
from loop.cli import guarded, parse
from loop.model import resolve_device


def main(argv: list[str] | None = None) -> int:
    began = time.monotonic()
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = parse(default(arguments), "python -m bench.run", "Gates and times every optimization.", arguments)
    device, dtype = resolve_device(command)
    check(command)
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, here and in the arms
    names = (*command.arms, "peers") if command.peers else command.arms
    arms = plan_arms(names, gate_config(command, command.gate), device)
    environment = describe(device)
    path = records_file(command.reports, environment["device_slug"])
    recipe = recipe_of(command, str(dtype).removeprefix("torch."))
    ledger = Ledger(path, command.run or new_run_id(environment), recipe)
    ledger.check(environment)
    try:
        left = _arms(command, device, arms, ledger, environment, Budget(command.minutes, began))
    except KeyboardInterrupt:
        if ledger.records():
            print(f"what was measured is kept; the same command with --run {ledger.run_id} goes on", file=sys.stderr)
        raise
    print(_finished(command.reports, ledger, left))
    return 0


def _arms(
    command: Command, device: torch.device, arms: list[ArmPlan], ledger: Ledger, environment: dict[str, Any], budget: Budget
) -> list[str]:
    """Measures what is this command's to measure, and returns what the run then has no record of."""
    todo = [plan for plan in arms if not ledger.has(plan)]
    blocks = command.timing.blocks
    units = planned_units(command.gate, blocks, todo, command.combine)
    with GateProgress(units) as progress, Claims(ledger.path.parent, ledger.run_id) as claims:

        def skip(plan: ArmPlan) -> None:
            progress.skip(arm_units(command.gate, blocks, plan.own_stock))

        # Those that may work beside the reference come first, so that one does; but none passes a peer.
        stretches = groupby(todo, key=lambda plan: plan.role == "peer")
        order = [plan for _, some in stretches for plan in sorted(some, key=lambda plan: not goes_beside(plan, command))]
        config, width = gate_config(command, command.gate), side_by_side(command)
        turns = Turns(
            order, config, command.combine, ledger, claims, budget, skip, lambda plan: goes_beside(plan, command), width
        )
        mine = iter(turns)
        first = next(mine, None)
        progress.say(f"run {ledger.run_id}: {f'begins with {first[0].name}' if first else 'nothing to measure here'}")
        if first is not None:
            _measure(command, device, ledger, environment, budget, progress, chain([first], mine), todo)
        left = turns.left()
        if left:
            progress.say(f"left: {', '.join(left)}; the same command with --run {ledger.run_id} goes on with them")
        return left


def _measure(
    command: Command, device: torch.device, ledger: Ledger, environment: dict[str, Any], budget: Budget,
    progress: GateProgress, mine: Iterator[tuple[ArmPlan, ...]], todo: Iterable[ArmPlan],
) -> None:  # fmt: skip
    """The reference, and then the batches of arms `mine`, at least one. todo: all arms without a record.

    Arms share the GPU through MPS while they gate, and are timed under it, too. That is fair: both sides of a ratio are
    clients of the same service, whose kernels reach the GPU without passing through it and may use all of the GPU, and
    nobody else launches any while a block is timed. An arm launches only what a command asks for, the clock asks one arm at
    a time, and all gating is over by then or has not begun. In every run the repeat's ratio shows what that is worth.
    """
    if device.type == "cuda":
        template.ahead(environment_of_arms({}))  # it imports while the GPU is measured
    ceilings = measure_ceilings(device)
    config = gate_config(command, command.gate)
    with (
        tempfile.TemporaryDirectory(prefix="isoloss-") as scratch,
        shared_gpu(device.type == "cuda" and command.gate.parallel > 1) as variables,
        Experiment(config, command.gate, Path(scratch), environment_of_arms(variables), progress) as experiment,
    ):

        def own_experiment(plan: ArmPlan) -> Experiment:
            folder = Path(scratch) / plan.name
            folder.mkdir()
            return Experiment(plan.config, command.gate, folder, environment_of_arms(variables), progress)

        environment = environment | {"shared_by_mps": joined(variables)}
        facts = facts_of(ledger.run_id, ledger.recipe, environment, ceilings)
        bench = Bench(command, progress, experiment, ceilings, facts, own_experiment)
        first = next(mine)
        bench.begin_ahead(todo)
        began = time.monotonic()
        bench.reference(first[0])
        budget.note_stock(time.monotonic() - began)
        for batch in chain([first], mine):
            bench.gather(batch)
            for plan in batch:
                began = time.monotonic()
                bench.arm(plan)
                budget.note(plan, time.monotonic() - began + bench.head_start.get(plan.name, 0.0))


def _finished(reports: Path, ledger: Ledger, left: list[str]) -> str:
    """Renders the reports, and returns the run as one JSON document: every arm by whichever command, and what is left."""
    found = ledger.records()
    if not found:  # other commands are at all of it
        return json.dumps({"run_id": ledger.run_id, "arms": [], "left": left})
    with alone_in(reports / "data"):
        render(reports / "data", reports)
    return json.dumps(json.loads(summary_json(found)) | {"left": left}, allow_nan=False)


if __name__ == "__main__":
    guarded(main)
