"""The answer of a search through the gate, beside stock, and into the records: as any combination of `bench.run`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from abtest.command import gate_config
from abtest.experiment import Experiment
from abtest.mps import environment_of_arms, joined, shared_gpu
from abtest.progress import GateProgress
from bench.ceilings import measure_ceilings
from bench.command import Command, facts_of
from bench.ledger import Ledger
from bench.measure import Bench
from bench.plan import ArmPlan, planned_units
from bench.records import Record
from bench.report.shipping import PARTIAL_SEARCH, SEARCH
from bench.search.trials import Set
from kernels import registry


def plan_of(optimizations: Set, whole: bool, command: Command) -> ArmPlan:
    """The arm of the answer. whole: whether the search began with stock and came to its end among all that may be searched;
    only such an answer goes before what was measured without being compared with others."""
    return ArmPlan(
        name=SEARCH if whole else PARTIAL_SEARCH,
        role="combination",
        optimizations=optimizations,
        config=gate_config(command, command.gate),
        claim=registry.weakest_claim(optimizations),
        summary=f"{', '.join(optimizations)} together: the fastest set that python -m bench.search found"
        + ("" if whole else ", which did not try everything"),
        why_exact="each part by its own argument; the whole by its own gate",
    )


def recorded(plan: ArmPlan, found: Iterable[Record]) -> bool:
    """Whether the answer has its record in `found`, the run's, oldest first; of each arm the newest counts. For a partial
    search that of any combination of the same set will do, as `bench.run --arms a+b` leaves one, since both compete in the
    same way; but none from before a whole search, which goes before what was measured earlier."""
    newest: dict[str, Record] = {}
    for record in found:
        if record.role == "combination":
            if record.arm == SEARCH and plan.name != SEARCH:
                newest.clear()
            newest[record.arm] = record
    fit = [record for arm, record in newest.items() if arm == SEARCH or plan.name != SEARCH]
    return any(set(record.optimizations) == set(plan.optimizations) for record in fit)


def prove(
    plan: ArmPlan, command: Command, device: torch.device, ledger: Ledger, environment: dict[str, Any], words: str
) -> Record:
    """Gates the arm beside a stock of its own, times it if it passed, and keeps both records. words: of the command.

    Arms share the GPU as in `bench.run`. Raises UserError where stock can't run.
    """
    ceilings = measure_ceilings(device)
    units = planned_units(command.gate, command.timing.blocks, [plan], combine=False)
    with (
        tempfile.TemporaryDirectory(prefix="isoloss-") as scratch,
        GateProgress(units) as progress,
        shared_gpu(device.type == "cuda" and command.gate.parallel > 1) as variables,
        Experiment(plan.config, command.gate, Path(scratch), environment_of_arms(variables), progress) as experiment,
    ):
        environment = environment | {"shared_by_mps": joined(variables)}
        facts = facts_of(ledger.run_id, ledger.recipe, environment, ceilings) | {"command": words}
        bench = Bench(command, progress, experiment, ceilings, facts)
        bench.reference(plan)
        bench.gather((plan,))
        bench.arm(plan)
    return ledger.records()[-1]
