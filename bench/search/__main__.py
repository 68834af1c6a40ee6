"""`python -m bench.search`: finds the fastest set of what passed its gate, proves it, and writes the report.

What was timed goes to reports/data/search/<device>.jsonl, the answer's record to those of the device; `shipping.toml` is
rendered from these. The last line on stdout is one JSON document; everything else goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from abtest.arm import Arm
from abtest.command import command_line, gate_config
from abtest.environment import describe
from abtest.mps import environment_of_arms
from bench.claims import Claims, alone_in
from bench.command import recipe_of, records_file
from bench.ledger import Ledger
from bench.plan import conflict
from bench.records import read, writing_to
from bench.report import render, summary_json
from bench.search.arms import SearchArms, in_words
from bench.search.candidates import Candidate, beginning, candidates
from bench.search.candidates import in_words as why_not
from bench.search.command import SearchCommand, check_search, default, run_of
from bench.search.conductor import Conductor
from bench.search.prove import plan_of, prove, recorded
from bench.search.strategy import Answer, Search
from bench.search.trials import Set, TrialLedger, path_of
from loop.cli import guarded, parse
from loop.errors import UserError
from loop.model import resolve_device


def main(argv: list[str] | None = None) -> int:
    began = time.monotonic()
    arguments = list(sys.argv[1:] if argv is None else argv)
    words = command_line("bench.search", arguments)
    command = parse(default(arguments), "python -m bench.search", "Finds the fastest lossless set.", arguments)
    device, dtype = resolve_device(command)
    check_search(command)
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, here and in the arms
    environment = describe(device)
    path = records_file(command.reports, environment["device_slug"])
    recipe = recipe_of(command.bench, str(dtype).removeprefix("torch."))
    found = read(path) if path.exists() else []
    chosen, others = candidates(found, recipe, gate_config(command, command.gate), device, command.arms)
    begin = beginning(command.begin, chosen, others, conflict)
    ledger = run_of(command, path, found, recipe, environment, say)
    facts = {"command": words, "environment": environment, "recipe": recipe}
    trials = _trials(command, environment["device_slug"], ledger.run_id, chosen, facts)
    with Claims(path.parent, ledger.run_id) as claims:
        if not claims.take("search"):
            raise UserError(f"--run {ledger.run_id}: another command is at this search; wait for it, or take another --run")
        try:
            answer = _search(command, device, chosen, others, begin, trials, ledger.run_id, began)
            _settle(command, device, ledger, environment, words, answer, answer.finished and not (command.arms or begin))
        except KeyboardInterrupt:
            if trials.known:
                print(f"what was timed is kept; the same command with --run {ledger.run_id} goes on", file=sys.stderr)
            raise
    print(_finished(command.reports, ledger, answer))
    return 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _trials(command: SearchCommand, slug: str, run_id: str, chosen: list[Candidate], facts: dict[str, Any]) -> TrialLedger:
    """What is the user's to mend is to mend now: raises UserError for a damaged line, or a folder that can't be made."""
    path = path_of(command.reports, slug)
    with writing_to(command.reports):
        path.parent.mkdir(parents=True, exist_ok=True)
        return TrialLedger(path, run_id, [candidate.name for candidate in chosen], facts)


def _search(
    command: SearchCommand, device: torch.device, chosen: list[Candidate], others: dict[str, str], begin: Set,
    trials: TrialLedger, run_id: str, began: float,
) -> Answer:  # fmt: skip
    say(f"run {run_id}: searching among {', '.join(candidate.name for candidate in chosen)}")
    if begin:
        say(f"it begins with {in_words(begin)}")
    if others:
        say(f"not searched: {why_not(others)}")
    config = gate_config(command, command.gate)
    with (
        tempfile.TemporaryDirectory(prefix="isoloss-") as scratch,
        SearchArms(
            lambda spec: Arm(spec, Path(scratch), environment_of_arms({})), config, command.clock,
            command.search.most_blocks, device.type == "cuda", lambda *progress: None,
        ) as arms,
    ):  # fmt: skip
        until = None if command.minutes is None else began + 60 * command.minutes
        conductor = Conductor(arms, trials, say, until)
        return Search(chosen, conflict, conductor, command.search.width, begin).run()


def _settle(
    command: SearchCommand, device: torch.device, ledger: Ledger, environment: dict[str, Any], words: str, answer: Answer,
    whole: bool,
) -> None:  # fmt: skip
    """Gates the answer, if there is one and it has no record yet."""
    best = in_words(answer.optimizations)
    if not answer.finished:
        how = "gated as it is" if command.accept else f"the same command with --run {ledger.run_id} goes on"
        say(f"the {command.minutes:g} minutes are over: best so far is {best}; {how}")
        if not command.accept:
            return
    if not answer.optimizations:
        why = "no member is missed" if command.begin else "nothing is faster than stock by its whole interval"
        say(f"{why}: there is nothing to gate")
        return
    plan = plan_of(answer.optimizations, whole, command.bench)
    if recorded(plan, ledger.records()):
        say(f"{best} is the answer; run {ledger.run_id} has its record")
        return
    say(f"{best} is the answer; it goes through the gate")
    level = prove(plan, command.bench, device, ledger, environment, words).verdict.level
    if not level.lossless:
        say(f"{level.value}: this set does not ship; what shipped before stays")


def _finished(reports: Path, ledger: Ledger, answer: Answer) -> str:
    """Renders the reports, and returns the run as one JSON document, with what the search found."""
    with alone_in(reports / "data"):
        render(reports / "data", reports)
    found = ledger.records()
    run = json.loads(summary_json(found)) if found else {"run_id": ledger.run_id, "arms": []}
    gains = {trial.left_out[0]: trial.gain for trial in answer.left_out}
    searched = {"optimizations": answer.optimizations, "finished": answer.finished, "left_out": gains}
    return json.dumps(run | {"search": searched}, allow_nan=False)


if __name__ == "__main__":
    guarded(main)
