"""One arm in a process of its own: reads commands, one JSON line each, from stdin, and answers on stdout.

Run by `abtest.arm`. Whatever libraries print goes to stderr, so that the answers stay parseable.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import load_file

from abtest import fingerprint as fp
from abtest import states, tripwire
from abtest.arm import OUT_OF_MEMORY
from abtest.catalogue import find
from abtest.census import model_flops
from abtest.examiner import Examiner, plain
from abtest.free_run import device_bytes, free_run, save_state, state_bytes
from abtest.gradients import Distances
from abtest.oracle import exact_gradients, keeping, make_exact, packing_error, recurrence_error
from abtest.oracle_cache import OracleCache
from abtest.patience import PATIENCE, patiently
from abtest.perturb import Start
from abtest.probes import Probe, memorised, memorised_probes, probes
from abtest.projection import keep
from abtest.states import Held
from abtest.stopwatch import Stopwatch
from kernels.interpreter import exchange_language_once
from loop.config import Config
from loop.data import Dataset
from loop.errors import UserError
from loop.model import implementation_paths, trainable
from loop.recipe import from_plain
from loop.run import Run
from loop.training import build, switch_on

# Probes on which the reference's packed path is compared with unpacked documents: several at the two states where a leak
# shows most and where it costs least, elsewhere the one with the most boundaries.
PACKED_PROBES, TRICKY = 4, 1
# So many times what it takes with recomputation: 3.3 of them without (68 GiB at 2B, as measured); repeat and candidate take
# one each, and all of them, and the reference, weights while they rest.
ROOM = 6
AHEAD = ("peft", "transformers")  # what every arm imports, and takes its time


class Worker(Examiner, Stopwatch):
    """Holds the run of one arm and carries out commands on it. `failures`: errors that end the arm with their own words; any
    other ends the process with its traceback."""

    failures: tuple[type[Exception], ...] = ()

    def __init__(self, answers: TextIO) -> None:
        self.answers = answers

    def event(self, **fields: Any) -> None:
        print(json.dumps(fields), file=self.answers, flush=True)

    def step(self, done: int, total: int) -> None:
        self.event(event="step", step=done, steps=total)

    def ahead(self, config: dict) -> dict:
        """What `build` will need and what takes neither a GPU nor memory of one, for a process that waits for its turn."""
        return {}

    def carry_out(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """The answer to one of `COMMANDS`; one of `OVER_AGAIN` waits for memory where that is short."""

        def work() -> dict[str, Any]:
            return getattr(self, command)(**arguments)

        return patiently(work, self._start_over) if command in OVER_AGAIN else work()

    def _start_over(self) -> None:
        """Gives back what half of a command left behind."""
        self.run.optimizer.zero_grad()
        self._release()

    # Building

    def build(self, config: dict, optimizations: list[str], planted: str | None = None, exact: bool = False) -> dict:
        """A fresh run; `planted` is a case of the catalogue; `exact` raises the run to the oracle's dtype."""
        self.config, self.optimizations, self.planted = from_plain(Config(), config), optimizations, planted
        self.distances_of: dict[str, Distances] = {}
        self.marks: dict[str, list] = {}
        self.start: Start | None = None
        self.weights_marks: dict[str, str] = {}
        self.probe_sets: dict[tuple, list[Probe]] = {}
        changed = self._make()
        parameters = trainable(self.run.model)
        frozen = {name: p for name, p in self.run.model.named_parameters() if not p.requires_grad}
        answer = {
            "enabled": self.run.enabled,
            "refused": self.run.refused,
            "changed": changed,
            "weights": fp.fingerprint(parameters),
            "frozen": fp.fingerprint(dict(sorted((name.replace(".base_layer", ""), p) for name, p in frozen.items()))),
            "elements": {name: parameter.numel() for name, parameter in parameters.items()},
            "seed": self.config.seed,
            "paths": implementation_paths(self.run.model),
            "data": self.dataset.statistics() | {"content_hash": self.dataset.content_hash},
            "flops": model_flops(self.run),
            "state_bytes": state_bytes(self.run),
            "device_bytes": device_bytes(self.run.device),
        }
        # Two models may share weights and differ in a scale, a window or the release that computes them.
        settings = self.run.model.config.to_json_string(use_diff=False) + repr(self.config.lora)
        self.model_mark = answer["weights"] + answer["frozen"] + settings
        self.exact = make_exact(self.run) if exact else None
        return answer

    def _make(self) -> bool:
        """Builds the arm's run, and waits where memory is short. Returns whether what was switched on changed any of its
        seams."""
        return patiently(self._make_now, self._clear)

    def _make_now(self) -> bool:
        self.run, self.dataset = self._fresh(self.config)
        self.loaded: str | None = None
        self.held = Held.of(self.run)
        before, parts = fp.seams(self.run), tripwire.parts(self.run)
        self._switch_on(self.run)
        self.own = tripwire.exchanged(parts, self.run)
        return before != fp.seams(self.run)

    def _let_go(self) -> None:
        """Gives up the arm's run, and with it all that it holds."""
        del self.run, self.held, self.own
        self._clear()

    def give_back(self) -> dict:
        """What no tensor is in, others on the same device may have."""
        self._release()
        return {}

    def rest(self) -> dict:
        """Gives up the run and its memory, until `resume` builds it anew."""
        self.batches = []
        self._let_go()
        return {}

    def resume(self) -> dict:
        self._make()
        return {}

    def _fresh(self, config: Config) -> tuple[Run, Dataset]:
        return build(config)

    def _switch_on(self, run) -> None:
        switch_on(run, self.optimizations)
        if self.planted is not None:
            case = find(self.planted)
            reason = case.planted.eligible(run)
            if reason is not None:
                run.refused[self.planted] = reason
                return
            case.apply(run)
            run.enabled.append(self.planted)
            torch.manual_seed(self.config.seed)

    # Training, and the weights that come of it

    def free_run(
        self, steps: int, states_to: dict[str, tuple[str, str]] | None = None, resync_to: dict[str, str] | None = None,
        resync: dict[str, str] | None = None,
    ) -> dict:  # fmt: skip
        """Trains from the initial weights. states_to: before which steps to write the weights of which states, and where, as
        (state, path); resync_to: before which to write the whole optimizer, and where. resync: before which steps to take
        the optimizer."""

        def before_step(step: int) -> None:
            if str(step) in (states_to or {}):
                state, path = states_to[str(step)]
                self.held.save(self.run, Path(path), state)
            if str(step) in (resync_to or {}):
                save_state(self.run, Path(resync_to[str(step)]))

        return self._trained(steps, resync, before_step)

    def _trained(
        self, steps: int, resync: dict[str, str] | None, before_step: Callable[[int], None] | None = None,
        kick_seed: int | None = None, patience: float = PATIENCE,
    ) -> dict:  # fmt: skip
        torch.manual_seed(self.config.seed)  # as when it was built: arms in one process share the generator
        sources = {int(step): Path(path) for step, path in (resync or {}).items()}
        answer = free_run(self.run, self.dataset, steps, self.step, sources, before_step, kick_seed, patience)
        self.loaded = None
        self._release()
        return answer

    def remember(self) -> dict:
        """Keeps what the run, which has not trained yet, begins with: every replica begins there."""
        self.start, self.recomputing = Start.of(self.run), None
        return {}

    def replica(self, steps: int, resync: dict[str, str], seed: int, kept: bool) -> dict:
        """The losses of a run that begins with what `remember` kept, kicked. kept: recomputes nothing, if there is room for
        what that keeps; its losses have the same bits."""
        kept = kept and self._roomy()
        while True:
            self.start.restore(self.run)
            try:
                with keeping(self.run.model, kept):
                    patience = 0 if kept else PATIENCE  # who keeps less need not wait
                    loss = self._trained(steps, resync, kick_seed=seed, patience=patience)["loss"]
            except torch.OutOfMemoryError:
                if not kept:
                    raise
            else:
                break
            kept = False  # not in the handler, which holds what was kept
            self._release()
        if not kept and self.run.device.type == "cuda":
            self.recomputing = torch.cuda.max_memory_allocated(self.run.device)
        return {"loss": loss, "kept": kept, "roomy": self._large()}

    def _roomy(self) -> bool:
        return self.run.device.type == "cpu" or self._large()

    def _large(self) -> bool:
        """Whether this is a GPU so large that the other arms have theirs when this one recomputes nothing, which is known
        once it has recomputed."""
        return self.recomputing is not None and device_bytes(self.run.device) >= ROOM * self.recomputing

    def save_weights(self, path: str) -> dict:
        """Writes the weights as they are as a state."""
        self.held.save(self.run, Path(path))
        return {}

    def overfit(self, path: str) -> dict:
        """Trains the reference on until it knows a few documents by heart, and writes its weights."""
        loss, steps = states.overfit(self.run, memorised(self.dataset))
        self.held.save(self.run, Path(path))
        self._release()
        return {"loss": loss, "steps": steps}

    def _load(self, weights: str) -> None:
        """Teacher forcing: the reference's weights of that state, rounded as the compute dtype rounds them."""
        if self.loaded != weights:
            self.held.load(weights)
            self.loaded = weights

    def _release(self) -> None:
        """What this process no longer needs, others on the same device may."""
        torch.cuda.empty_cache()  # nothing happens where there is no device

    def _clear(self) -> None:
        """The same, behind a run that is no longer wanted or came half way: its parts refer to each other."""
        gc.collect()
        self._release()

    def _probe(self, state: str, index: int, count: int, seed: int) -> Probe:
        key = (state == states.OVERFIT, count, seed)
        if key not in self.probe_sets:
            packs, vocabulary = self.config.data.packs_per_micro_step, self.run.model.config.vocab_size
            own = key[0]
            self.probe_sets[key] = (
                memorised_probes(memorised(self.dataset), count, seed)
                if own
                else probes(self.dataset, count, packs, vocabulary, seed)
            )
        return self.probe_sets[key][index]

    # 2, gradients

    def oracle(self, state: str, weights: str, index: int, count: int, seed: int, folder: str, budget: int) -> dict:
        """Makes sure that a probe's exact gradients are in the cache `folder`. Answers with the file, and for the first few
        probes of a state how far the reference's packed path and the recurrence are from it in the same arithmetic."""
        self._load(weights)
        probe = self._probe(state, index, count, seed)
        cache = OracleCache(Path(folder), budget)
        tokens = fp.batch_fingerprint(probe)
        facts = (self.model_mark, self._mark_of(weights), tokens, self.exact, self.run.dtype)
        path = cache.path(*facts, states.is_slow(state))  # what is noted depends on that
        notes = cache.get(path, lambda: self._exact(probe, tokens, state, index))
        self._release()
        return {"path": str(path), "notes": {name: json.loads(value) for name, value in notes.items() if name != "format"}}

    def _mark_of(self, weights: str) -> str:
        """The fingerprint of a state's file, which nobody writes twice: once, and on the device, since it takes seconds."""
        if weights not in self.weights_marks:
            self.weights_marks[weights] = fp.fingerprint(load_file(weights, device=str(self.run.device)))
        return self.weights_marks[weights]

    def _exact(self, probe: Probe, tokens: str, state: str, index: int) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        truth = {name: g.clone() for name, g in exact_gradients(self.run, probe, self.exact).items()}
        notes, slow = {}, states.is_slow(state)
        if index == TRICKY or (index < PACKED_PROBES and (slow or state == states.OVERFIT)):
            notes["packing_error"] = json.dumps(packing_error(self.run, probe, self.exact, truth))
        if index == TRICKY and slow:
            notes["recurrence_error"] = json.dumps(recurrence_error(self.run, probe[0], self.exact))
        self.run.optimizer.zero_grad()
        return keep(truth, tokens), notes

    def gradients(self, state: str, weights: str, index: int, count: int, seed: int, truth: str) -> dict:
        """This arm's gradients on one probe, added to the state's distances from the oracle's."""
        if index == 0:
            self.distances_of[state], self.marks[state] = Distances(), []
        self._load(weights)
        self._measure(self._probe(state, index, count, seed), truth, self.distances_of[state], self.marks[state])
        return {}

    def distances(self, state: str, rows: str) -> dict:
        """The sums over a state's probes; row sums go to the file `rows`."""
        self._release()
        answer = plain(self.distances_of[state], rows)
        marks = self.marks[state]
        return answer | {"fingerprints": [mark for mark, _ in marks], "losses": [losses for _, losses in marks]}


COMMANDS = (
    "ahead", "build", "remember", "replica", "free_run", "save_weights", "overfit", "oracle", "gradients", "distances",
    "structure", "update", "work", "tripwire", "trace", "autotuned", "op_checks",
    "prepare_timing", "time_block", "finish_timing", "prepare_updates", "time_update", "finish_updates",
    "give_back", "rest", "resume",
)  # fmt: skip


# What begins anew each time it is asked, and may be asked again where memory was short.
OVER_AGAIN = {"structure", "work", "oracle", "tripwire", "trace"}


def import_ahead(modules: Sequence[str] = AHEAD) -> None:
    """Imports what is there of `modules`; nobody waits for it yet."""
    gc.disable()  # what is imported stays: going through it time and again takes a fifth of the start
    for module in modules:
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module)
    gc.freeze()
    gc.enable()


def main(make: Callable[[TextIO], Worker] = Worker, ahead: Sequence[str] = AHEAD) -> None:
    """Carries out commands until there are no more. ahead: modules to import before the first one comes."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    import_ahead(ahead)
    exchange_language_once()
    worker = make(answers)
    for line in sys.stdin:
        request = json.loads(line)
        command = request.pop("command")
        if command not in COMMANDS:
            raise ValueError(f"unknown command {command!r}")
        try:
            worker.event(answer=worker.carry_out(command, request))
        except torch.OutOfMemoryError as error:  # what follows lists every process of the GPU
            wanted = ". ".join(str(error).splitlines()[0].split(". ")[:2])
            worker.event(failed=f"{OUT_OF_MEMORY} in {command}: {wanted}")
            return
        except worker.failures as error:
            traceback.print_exc()
            worker.event(failed=f"{command}: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
            return
        except UserError as error:
            worker.event(user_error=str(error))


if __name__ == "__main__":
    main()
