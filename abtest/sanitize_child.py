"""The process that `abtest.sanitize` watches: one optimization's op, forward and backward, on its small workloads.

`python -m abtest.sanitize_child NAME TASK [SIDE]`; SIDE is candidate, reference or control, which is PyTorch alone. The last
line on stdout is one JSON document. It knows nothing of what watches it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import torch

from abtest import fingerprint as fp
from abtest.huge import check_beyond_int32, unfit
from abtest.opcall import call, gradients_of, input_names, leaves, named_outputs, random_gradients
from abtest.opcheck import small_workloads
from kernels import registry
from kernels.contract import Op, Workload

CONTROL_SIZES = (48, 64, 128, 256)  # of square matrices: what small cases multiply


def results(op: Op, side: str, workload: Workload, device: torch.device) -> str:
    """Runs `side` ("candidate" or "reference") forward and backward once; a fingerprint of its outputs and gradients."""
    inputs = op.inputs(workload, device, 0)
    torch.manual_seed(0)
    outputs = call(getattr(op, side), inputs)
    wanted = dict(leaves(input_names(op.reference, inputs), inputs))
    found = gradients_of(outputs, wanted, random_gradients(outputs, 0))
    return fp.fingerprint(found | {name: output.detach() for name, output in named_outputs(outputs).items()})


def once(op: Op, side: str, device: torch.device) -> dict[str, Any]:
    """Each small workload once."""
    workloads = small_workloads(op)
    for workload in workloads:
        results(op, side, workload, device)
    return {"workloads": len(workloads)}


def control(device: torch.device) -> dict[str, Any]:
    """Nothing but PyTorch: products of written matrices, read by the kernels that candidates read products with."""
    read = 0
    for dtype in (torch.bfloat16, torch.float32):
        for size in CONTROL_SIZES:
            made = torch.ones(size, size, dtype=dtype, device=device)
            one, other = made @ made, made @ made
            joined = (torch.cat([one, other], dim) for dim in (0, 1))
            for rows in (*joined, one + other, one.t().contiguous(), one.float()):
                read += int(rows.sum() > 0)
    return {"workloads": read}


def repeat(op: Op, side: str, device: torch.device, repeats: int) -> dict[str, Any]:
    """Each small workload `repeats` times; how many results have other bits than the first, and where."""
    workloads, different = small_workloads(op), []
    for workload in workloads:
        marks = [results(op, side, workload, device) for _ in range(repeats)]
        other = sum(mark != marks[0] for mark in marks)
        if other:
            different.append(f"{other} of {repeats} in {workload.name}, {workload.dtype}")
    return {"workloads": len(workloads), "different": different}


def huge(op: Op, device: torch.device) -> dict[str, Any]:
    """The workloads beyond 2^31 elements: checks, and in words what didn't fit."""
    checks, not_run = [], []
    for workload in op.workloads:
        if workload.beyond_int32:
            reason = unfit(op, workload, device)
            if reason:
                not_run.append(reason)
            else:
                checks.append(dataclasses.asdict(check_beyond_int32(op, workload, device)))
    return {"checks": checks, "not_run": not_run}


def main(arguments: list[str]) -> None:
    name, task, *rest = arguments
    (optimization,) = registry.select([name])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if task == "huge":
        answer = huge(optimization.op, device)
    elif task == "repeat":
        answer = repeat(optimization.op, "candidate", device, int(rest[0]))
    elif rest[0] == "control":
        answer = control(device)
    else:
        answer = once(optimization.op, rest[0], device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    print(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1:])
