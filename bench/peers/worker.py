"""`python -m bench.peers.worker NAME`: the process of one peer's arm, driven as any other arm's (`abtest.worker`).

A peer is judged by its micro-step alone, which is all of it that is comparable: gradients beside the oracle's, the loss of a
free run, and the structural checks that need no more than whole steps. Not asked of it are those that call the loop's own
parts one by one, poisoned memory, dropout and the tripwire, which are about code of ours. The optimizer is the loop's here
too, since only forward and backward are compared and timed.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import torch

from abtest import fingerprint as fp
from abtest import worker
from abtest.census import count_launches
from abtest.limits import UPDATE
from abtest.patience import patiently
from abtest.structure import (
    Finding,
    apart_in_a_step,
    follows_inputs,
    follows_weights,
    gradients,
    inputs_unmodified,
    repeated,
)
from abtest.update import UpdateReport, check_update, update_config
from bench.peers import Peer, find
from bench.peers.ready import Ready, Unavailable, micro_step_of
from loop.config import Config
from loop.data import Dataset, load_dataset, load_tokenizer
from loop.errors import UserError
from loop.model import checkpoint_folder, cross_entropy_head, resolve_device, trainable
from loop.optim import MasterAdamW
from loop.recipe import from_plain
from loop.run import Run

# What a peer's code raises, written out; it ends the arm with the error's own words.
ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError, RuntimeError, TypeError,
    UserError, ValueError,
)  # fmt: skip
LIMIT_S = 600  # to build and take a first step, and to warm up for timing: someone else's compiler may never come back


@contextmanager
def within(seconds: float, what: str) -> Iterator[None]:
    """Ends the process, with one line that says so, if the block takes longer."""

    def give_up() -> None:
        print(f"{what} took more than {seconds:g} s", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class PeerWorker(worker.Worker):
    """A worker whose run is a peer's model with the loop's optimizer."""

    failures = ERRORS

    def __init__(self, answers: TextIO, peer: Peer) -> None:
        super().__init__(answers)
        self.peer, self.as_used, self.seconds = peer, False, 0.0
        self.code = importlib.import_module(f"bench.peers.{peer.module}")

    def ahead(self, config: dict) -> dict:
        """What the peer's `ahead(config)` does, where it has one."""
        began = time.monotonic()
        with within(LIMIT_S, f"getting {self.peer.name} ready"):
            getattr(self.code, "ahead", lambda config: None)(from_plain(Config(), config))
        self.seconds += time.monotonic() - began
        return {}

    def build(self, config: dict, optimizations: list[str], planted: str | None = None, exact: bool = False) -> dict:
        """The peer's run, and its first step, without which it can't be said to run. "refused" holds a reason where the peer
        has nothing for this model; "peer" the path that it took. Fingerprints are of the reference's dtype."""
        try:
            with within(LIMIT_S, f"building {self.peer.name} and its first step"):
                answer = super().build(config, [])
                took = self._first_step()
        except Unavailable as error:
            return {"refused": {self.peer.name: str(error)}}
        marks = {"weights": fp.fingerprint(self._as_reference(trainable(self.run.model))), "frozen": self._frozen()}
        return answer | marks | {"peer": took}

    def _fresh(self, config: Config) -> tuple[Run, Dataset]:
        began = time.monotonic()
        self.ready: Ready = self.code.build(self.peer, config)
        self.seconds += time.monotonic() - began
        device, dtype = resolve_device(config)
        dataset = load_dataset(config.data, load_tokenizer(checkpoint_folder(config.model), config.data), config.seed)
        micro_step = micro_step_of(self.ready)
        return Run(config, device, dtype, self.ready.model, cross_entropy_head, micro_step, self._optimizer(config)), dataset

    def _optimizer(self, config: Config) -> MasterAdamW:
        return MasterAdamW(trainable(self.ready.model), config.optim, config.steps)

    def _first_step(self) -> dict[str, Any]:
        began = time.monotonic()
        batch = self.dataset.micro_batches(0, 1, self.config.data.packs_per_micro_step)[0].to(self.run.device)
        self.run.micro_step(self.run, batch, batch.supervised_tokens)
        self.run.optimizer.zero_grad()
        self._release()
        seconds = {"built in s": round(self.seconds, 1), "first step in s": round(time.monotonic() - began, 1)}
        return self.ready.took | self.ready.observed() | seconds

    def _as_reference(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """In the compute dtype, which the reference has throughout: a peer may keep in fp32 what it rounds in every step."""
        return {name: tensor.detach().to(self.run.dtype) for name, tensor in tensors.items()}

    def _frozen(self) -> str:
        """The fingerprint of what does not train, tied tensors once, whether or not they are one object here."""
        seen, found = {p.data_ptr() for p in self.run.model.parameters() if p.requires_grad}, {}
        for name, parameter in self.run.model.named_parameters():
            if not parameter.requires_grad and parameter.data_ptr() not in seen:
                seen.add(parameter.data_ptr())
                found[name.replace(".base_layer", "")] = parameter
        return fp.fingerprint(self._as_reference(dict(sorted(found.items()))))

    def structure(self, weights: str, state: str, indexes: list[int], count: int, seed: int, repeats: int) -> dict:
        """Check 5 as far as it is about whole micro-steps; one that raises has failed."""
        self._load(weights)
        own, run = [self._probe(state, index, count, seed) for index in indexes], self.run
        checks: list[tuple[str, Callable[[], list[Finding]]]] = [
            ("inputs unmodified", lambda: inputs_unmodified(run, own[0])),
            ("gradients follow inputs", lambda: follows_inputs(run, own[0], own[1])),
            ("gradients follow weights", lambda: follows_weights(run, own[0][0])),
            ("repeats have the same bits", lambda: repeated(run, own[1], repeats)),
            ("documents are kept apart", lambda: apart_in_a_step(run, own[-1][0])),
        ]
        findings = []
        for done, (name, check) in enumerate(checks):
            findings += _finding(name, check)
            run.optimizer.zero_grad()
            self.step(done + 1, len(checks))
        self._release()
        return {"findings": [dataclasses.asdict(finding) for finding in findings]}

    def update(self, seed: int, weights: str, state: str, count: int, alone: bool) -> dict:
        """Check 3 on the loop's optimizer over the peer's parameters, which then are as they were before; never on a second
        run, whether or not `alone`: a peer takes minutes to build. The optimizer makes room for the one that is checked, and
        where memory is short all the same that is waited for."""
        run, kept = self.run, {name: value.detach().cpu().clone() for name, value in self.run.optimizer.state().items()}
        run.optimizer.release()
        run.optimizer = None
        report = patiently(lambda: self._checked_update(seed), self._clear)
        run.optimizer = patiently(lambda: self._optimizer(self.config), self._clear)
        run.optimizer.load_state(kept)
        self.loaded = None
        self._release()
        return {
            "error": report.error, "name": report.name, "problems": list(report.problems), "limit": UPDATE, "findings": [],
        }  # fmt: skip

    def _checked_update(self, seed: int) -> UpdateReport:
        config = update_config(self.config)
        optimizer = self._optimizer(config)
        try:
            return check_update(dataclasses.replace(self.run, config=config, optimizer=optimizer), seed)
        finally:
            optimizer.release()

    def work(self, weights: str, state: str, index: int, count: int, seed: int) -> dict:
        """The census of one micro-step; of what compiles its code, device kernels alone."""
        if self.ready.eager:
            return super().work(weights, state, index, count, seed)
        self._load(weights)
        probe = self._probe(state, index, count, seed)
        gradients(self.run, probe)
        cuda = self.run.device.type == "cuda"
        kernels = count_launches(lambda: gradients(self.run, probe))[1] if cuda else {}
        return {"operators": {}, "modules": {}, "kernels": kernels, "kept": {}}

    def tripwire(
        self, weights: str, state: str, truths: dict[str, str], count: int, seed: int, new_operators: list[str], rows: str
    ) -> dict:
        """Nothing of the loop's was exchanged, so there is nothing to bend."""
        return {"bent": [], "unreached": [], "problems": []}

    def prepare_timing(self, micro_batches: int, warmup: int) -> dict:
        """From here on gradients are the peer's own, in its own dtype, as its user has them."""
        if not self.as_used:
            self.run.optimizer.release()
            self.ready.before_timing()
            self.as_used = True
        with within(LIMIT_S, f"warming up {self.peer.name}"):
            return super().prepare_timing(micro_batches, warmup)

    def _block(self) -> float:
        seconds = super()._block()
        for parameter in self.run.optimizer.parameters.values():
            parameter.grad = None
        return seconds


def _finding(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return check()
    except torch.OutOfMemoryError:
        raise
    except ERRORS as error:
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        return [Finding(name, False, f"it raises {type(error).__name__}: {first}")]


def main() -> None:
    peer = find(sys.argv[1])
    # Nothing is imported ahead: which packages are there, and in what order, is what makes a peer.
    worker.main(lambda answers: PeerWorker(answers, peer), ahead=())


if __name__ == "__main__":
    main()
