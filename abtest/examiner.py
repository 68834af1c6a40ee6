"""What a worker is asked besides training and gradients: preflight's proofs, the update, exact structure, the trace."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from abtest import dropout, tripwire
from abtest import fingerprint as fp
from abtest.autotune import chosen
from abtest.census import work
from abtest.gradients import Distances
from abtest.limits import UPDATE
from abtest.op_level import op_reports
from abtest.oracle import exact_arithmetic
from abtest.patience import patiently
from abtest.probes import Probe, supervised
from abtest.projection import kept
from abtest.structure import examine, gradients
from abtest.trace import trace
from abtest.update import check_update, update_config
from kernels import registry
from loop.batch import PackedBatch
from loop.config import Config
from loop.run import Run
from loop.training import accumulate, build

CENSUS_OPERATORS = 8  # new operators that are bent one by one


class Examiner:
    """Commands of a worker, which holds `run`, `config`, `optimizations`, `exact` and `own`, and knows `_load`, `_probe`,
    `_release`, `_clear`, `_make`, `_let_go`, `_switch_on` and `step`."""

    def _measure(self, probe: Probe, truth: str, distances: Distances, marks: list) -> None:
        losses, gradients, exact = patiently(lambda: self._beside(probe, truth), self._release)
        marks.append((fp.fingerprint(gradients), losses))
        distances.add(gradients, exact)
        self.run.optimizer.zero_grad()

    def _beside(self, probe: Probe, truth: str) -> tuple[list[float], dict, dict]:
        """Losses and gradients of a probe, and the oracle's gradients."""
        self.run.optimizer.zero_grad()
        losses = accumulate(self.run, list(probe), supervised(probe))
        return losses, self.run.optimizer.gradients(), kept(load_file(truth, device=str(self.run.device)))

    def structure(self, weights: str, state: str, indexes: list[int], count: int, seed: int, repeats: int) -> dict:
        """Check 5 at these weights, on the probes named."""
        self._load(weights)
        own = [self._probe(state, index, count, seed) for index in indexes]
        findings = examine(self.run, own, repeats, self.step)
        self._release()
        return {"findings": [dataclasses.asdict(finding) for finding in findings]}

    def update(self, seed: int, weights: str, state: str, count: int, alone: bool) -> dict:
        """Check 3, and check 5's part with dropout, on a run built anew: with rates at which an update can be told from
        rounding, and with dropout where the arm takes it. alone: the arm's own run makes way for it, and is built again
        behind it; two of them, and copies of an optimizer's state, are more than a device may hold. Where that shows first
        when memory is short, it makes way then."""
        batch = self._probe(state, 0, count, seed)[0]
        self._release()
        if not alone:
            try:
                return self._update(seed, batch)
            except torch.OutOfMemoryError:
                pass
        self._let_go()  # not in the handler, which holds the second run
        answer = patiently(lambda: self._update(seed, batch), self._clear)
        self._make()
        return answer

    def _update(self, seed: int, batch: PackedBatch) -> dict:
        config, findings = update_config(self.config), []
        run = self._again(dropout.dropout_config(config)) if self.config.method == "lora" else None
        if run is None or run.refused:
            run = self._again(config)
        else:
            findings = [dataclasses.asdict(finding) for finding in dropout.examine(run, batch, self.step)]
        report = check_update(run, seed)
        del run
        self._clear()
        return {
            "error": report.error, "name": report.name, "problems": list(report.problems), "limit": UPDATE,
            "findings": findings,
        }  # fmt: skip

    def _again(self, config: Config) -> Run:
        """A second run beside the first one."""
        run, _ = build(config)
        self._switch_on(run)
        return run

    def work(self, weights: str, state: str, index: int, count: int, seed: int) -> dict:
        """The census of one micro-step."""
        self._load(weights)
        probe = self._probe(state, index, count, seed)
        cuda = self.run.device.type == "cuda"
        gradients(self.run, probe)  # kernels are compiled, graphs captured
        answer = work(lambda: _accumulate(self.run, probe), cuda)
        self.run.optimizer.zero_grad()
        self._release()
        return answer

    def op_checks(self, optimizations: list[str], device: str) -> dict:
        """The op level of `optimizations`; asks nothing of the run, and needs none."""
        return {"rows": op_reports(registry.select(optimizations), torch.device(device))}

    def autotuned(self) -> dict:
        """What the autotuners of this arm's optimizations chose so far, by kernel: on the run's shapes, once it trained."""
        return {name: choice for one in registry.select(self.optimizations) for name, choice in chosen(one).items()}

    def tripwire(
        self, weights: str, state: str, truths: dict[str, str], count: int, seed: int, new_operators: list[str], rows: str
    ) -> dict:
        """Gradients of the probes in `truths` while the arm's own parts are bent, and which new operators reach nothing."""
        self._load(weights)
        distances, marks = Distances(), []
        with tripwire.bent(self.run, self.own) as names:
            for index, truth in truths.items():
                self._measure(self._probe(state, int(index), count, seed), truth, distances, marks)
        probe = self._probe(state, int(next(iter(truths))), count, seed)
        untouched, unreached = gradients(self.run, probe), []
        for operator in new_operators[:CENSUS_OPERATORS]:
            with tripwire.BentOperator(operator) as bend:
                if gradients(self.run, probe) == untouched and bend.hits:
                    unreached.append(operator)
        self._release()
        answer = plain(distances, rows) | {"losses": [losses for _, losses in marks]}
        return answer | {"bent": names, "unreached": unreached}

    def trace(self, weights: str, state: str, index: int, count: int, seed: int, path: str) -> dict:
        """Hidden states and their gradients at every layer, for one probe's first batch."""
        self._load(weights)
        batch = self._probe(state, index, count, seed)[0]
        if self.exact is None:
            trace(self.run, batch, Path(path))
        else:
            with exact_arithmetic(self.exact):
                trace(self.run, batch, Path(path))
        self._release()
        return {}


def _accumulate(run: Run, probe: Probe) -> None:
    accumulate(run, list(probe), supervised(probe))


def plain(distances: Distances, rows: str) -> dict:
    save_file({name: value.contiguous() for name, value in distances.rows.items()}, rows)
    return {
        "error": distances.error, "norm": distances.norm, "dot": distances.dot, "elements": distances.elements,
        "problems": distances.problems, "rows": rows,
    }  # fmt: skip
