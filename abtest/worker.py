"""One arm in a process of its own: reads commands, one JSON line each, from stdin, and answers on stdout.

Run by `abtest.arm`. Whatever libraries print goes to stderr, so that the answers stay parseable.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import load_file, save_file

from abtest import fingerprint as fp
from abtest.census import count_launches, model_flops
from abtest.gradients import Distances
from abtest.oracle import exact_gradients, make_exact, packing_error
from abtest.perturb import kick
from abtest.probes import probe_batches
from loop import attention
from loop.config import Config
from loop.errors import UserError
from loop.model import implementation_paths, trainable
from loop.recipe import from_plain
from loop.training import accumulate, build, switch_on


class Worker:
    """Holds the run of one arm and carries out commands on it."""

    def __init__(self, answers: TextIO) -> None:
        self.answers = answers

    def event(self, **fields: Any) -> None:
        print(json.dumps(fields), file=self.answers, flush=True)

    def build(self, config: dict, optimizations: list[str], exact: bool = False) -> dict:
        """A fresh run; `exact` raises it to the oracle's dtype."""
        self.config, self.optimizations = from_plain(Config(), config), optimizations
        self.run, self.dataset = build(self.config)
        before = fp.seams(self.run)
        switch_on(self.run, optimizations)
        self.exact = make_exact(self.run) if exact else None
        parameters = trainable(self.run.model)
        return {
            "enabled": self.run.enabled,
            "refused": self.run.refused,
            "changed": before != fp.seams(self.run),
            "weights": fp.fingerprint(parameters),
            "elements": {name: parameter.numel() for name, parameter in parameters.items()},
            "paths": implementation_paths(self.run.model),
            "data": self.dataset.statistics() | {"content_hash": self.dataset.content_hash},
            "flops": model_flops(self.run),
        }

    def free_run(self, steps: int, save_state: str | None = None, kick_seed: int | None = None) -> dict:
        """Trains for `steps` steps from the initial weights and fingerprints every one of them."""
        if kick_seed is not None:
            self.run, self.dataset = build(self.config, self.optimizations)
            kick(self.run, kick_seed)
        out: dict[str, list] = {key: [] for key in ("loss", "gradients", "state", "rng", "lr", "batch", "supervised")}
        for step in range(steps):
            batches = self._step_batches(step)
            supervised = sum(batch.supervised_tokens for batch in batches)
            sums = accumulate(self.run, batches, supervised)
            if kick_seed is None:  # of a kicked run only the losses are asked for
                out["gradients"].append(fp.fingerprint(self.run.optimizer.gradients()))
            lr, _ = self.run.optimizer.step(step)
            if kick_seed is None:
                out["state"].append(fp.fingerprint(self.run.optimizer.state()))
                out["rng"].append(fp.rng_fingerprint(self.run.device))
                out["batch"].append(fp.batch_fingerprint(batches))
            out["loss"].append(sum(sums) / max(supervised, 1))
            out["lr"].append(lr)
            out["supervised"].append(supervised)
            self.event(event="step", step=step + 1, steps=steps)
        if save_state is not None:
            masters = self.run.optimizer.masters
            save_file({name: value.detach().cpu().contiguous() for name, value in masters.items()}, save_state)
        return out

    def _step_batches(self, step: int):
        return self.dataset.micro_batches(step, self.config.grad_accum, self.config.data.packs_per_micro_step)

    def _probes(self, count: int):
        vocabulary = self.run.model.config.vocab_size
        return probe_batches(self.dataset, count, self.config.data.packs_per_micro_step, vocabulary)

    @torch.no_grad()
    def load_weights(self, state: str | None) -> None:
        """Teacher forcing: the reference's trained weights, rounded as the compute dtype rounds them."""
        if state is None:
            return
        parameters = trainable(self.run.model)
        for name, value in load_file(state).items():
            parameters[name].copy_(value.to(self.run.dtype))

    def oracle(self, count: int, folder: str, state: str | None = None) -> dict:
        """Writes the exact gradients of every probe batch to `folder`, one file a batch.

        Answers with the largest error of the packed path in the same arithmetic, and the parameter that has it.
        """
        self.load_weights(state)
        errors = []
        for index, batch in enumerate(self._probes(count)):
            gradients = {n: g.cpu().contiguous() for n, g in exact_gradients(self.run, batch, self.exact).items()}
            save_file(gradients, Path(folder) / f"{index}.safetensors")
            errors.append(packing_error(self.run, batch, self.exact, gradients))
            self.event(event="step", step=index + 1, steps=count)
        worst, where = max(errors, key=lambda error: math.inf if math.isnan(error[0]) else error[0])
        return {"packing_error": worst, "packing_error_name": where}

    def gradients(self, count: int, folder: str, rows: str, state: str | None = None) -> dict:
        """This arm's gradients on the probe batches, as distances from the oracle's; row sums go to the file `rows`."""
        self.load_weights(state)
        distances, prints, losses = Distances(), [], []
        for index, batch in enumerate(self._probes(count)):
            self.run.optimizer.zero_grad()
            losses += accumulate(self.run, [batch], batch.supervised_tokens)
            gradients = self.run.optimizer.gradients()
            prints.append(fp.fingerprint(gradients))
            distances.add(gradients, load_file(Path(folder) / f"{index}.safetensors"))
            self.event(event="step", step=index + 1, steps=count)
        self.run.optimizer.zero_grad()
        save_file({name: value.contiguous() for name, value in distances.rows.items()}, rows)
        return {
            "error": distances.error, "norm": distances.norm, "dot": distances.dot, "elements": distances.elements,
            "problems": distances.problems, "fingerprints": prints, "losses": losses,
        }  # fmt: skip

    def prepare_timing(self, micro_batches: int, warmup: int) -> dict:
        """Puts the micro-batches on the device and warms up; peak memory counts from here.

        An arm with the reference's attention is timed with transformers' plain SDPA, because that is what a user gets; on
        Hopper its repeatable form is twice as slow as a whole stock micro-step. An arm with its own attention keeps it.
        """
        if self.run.model.config._attn_implementation == attention.NAME:
            self.run.model.set_attn_implementation(attention.PLAIN)
        self.batches = [batch.to(self.run.device) for step in range(micro_batches) for batch in self._step_batches(step)[:1]]
        for _ in range(warmup):
            self._block()
        if self.run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.run.device)
        totals = ("positions", "real_tokens", "supervised_tokens")
        return {name: sum(getattr(batch, name) for batch in self.batches) for name in totals}

    def _block(self) -> float:
        self._synchronize()
        began = time.perf_counter()
        for batch in self.batches:
            self.run.micro_step(self.run, batch, batch.supervised_tokens)
        self._synchronize()
        seconds = time.perf_counter() - began
        self.run.optimizer.zero_grad()
        return seconds

    def _synchronize(self) -> None:
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)

    def time_block(self) -> dict:
        """Seconds for one pass, forward and backward, over the prepared micro-batches."""
        return {"seconds": self._block()}

    def finish_timing(self) -> dict:
        """Peak memory (device memory on CUDA, resident memory of the process on a CPU) and launches a micro-step."""
        if self.run.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.run.device)
            launches, names = count_launches(lambda: self.run.micro_step(self.run, self.batches[0], 1))
            self.run.optimizer.zero_grad()
        else:
            peak, launches, names = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, None, {}
        return {"peak_memory_bytes": peak, "launches": launches, "kernels": names}


COMMANDS = ("build", "free_run", "oracle", "gradients", "prepare_timing", "time_block", "finish_timing")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for module in ("peft", "transformers"):  # while nobody waits: the first command may come later
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module)
    worker = Worker(answers)
    for line in sys.stdin:
        request = json.loads(line)
        command = request.pop("command")
        if command not in COMMANDS:
            raise ValueError(f"unknown command {command!r}")
        try:
            worker.event(answer=getattr(worker, command)(**request))
        except UserError as error:
            worker.event(user_error=str(error))
        except torch.OutOfMemoryError as error:
            worker.event(failed=f"out of memory: {str(error).splitlines()[0]}")
            return


if __name__ == "__main__":
    main()
