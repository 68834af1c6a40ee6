"""One case beyond 2^31 elements a kernel, where an offset in 32 bits wraps around and computes something finite and wrong.

A tensor of that size is too large for fp64 truth, and needs none: for an op that works row by row, the candidate's own
result on a few rows alone is what those rows of the whole must hold, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from abtest.opcall import call, gradients_of, input_names, leaves, named_outputs, random_gradients
from abtest.quantity import same_bits
from abtest.verdict import Check
from kernels.contract import Op, Workload

Results = dict[str, Tensor | None]

INT32 = 2**31
ROWS = 64  # of a block that is compared
MEMORY = 1.5  # times what the op moves: inputs, both directions' results, and what drawing random numbers takes


def unfit(op: Op, workload: Workload, device: torch.device) -> str | None:
    """None, or why this device can't run the workload."""
    if device.type != "cuda":
        return f"{workload.name} needs a GPU"
    needed, free = MEMORY * op.bytes_moved(workload), torch.cuda.mem_get_info(device)[0]
    if needed > free:
        return f"{workload.name} needs {needed / 2**30:.0f} GiB of GPU memory; {free / 2**30:.0f} GiB are free"
    return None


def check_beyond_int32(op: Op, workload: Workload, device: torch.device, seed: int = 0, wraps_at: int = INT32) -> Check:
    """Runs the candidate forward and backward on the whole, then on blocks of rows alone: the first and last ones, those
    in the middle, and those at the element whose offset wraps. Outputs and gradients must have the same bits.

    The op's inputs are tensors of one first dimension and plain values; wraps_at is smaller than 2^31 only in tests of this
    function. Raises ValueError for a workload that stays below it, torch.OutOfMemoryError where memory is short.
    """
    name = f"beyond {'2^31' if wraps_at == INT32 else wraps_at} elements"
    inputs = op.inputs(workload, device, seed)
    tensors = [item for item in inputs if isinstance(item, Tensor)]
    if any(len(item) != len(tensors[0]) for item in tensors) or any(isinstance(item, torch.nn.Module) for item in inputs):
        raise ValueError(f"{workload.name}: a row-wise op takes tensors of one number of rows, and no modules")
    largest = max(tensors, key=Tensor.numel)
    if largest.numel() <= wraps_at:
        raise ValueError(f"{workload.name} has {largest.numel()} elements; more than {wraps_at} are needed")
    try:
        different = _differing(op, inputs, seed, _blocks(len(largest), wraps_at // largest[0].numel()))
    except torch.OutOfMemoryError:
        raise  # says nothing of the candidate
    except RuntimeError as error:
        line = (str(error).strip().splitlines() or [""])[0]
        return Check(name, None, 0.0, False, f"the candidate raised {type(error).__name__}: {line}", part=5)
    return Check(name, float(len(different)), 0.0, not different, "; ".join(different[:3]), part=5)


def _blocks(count: int, wrap: int) -> list[slice]:
    """Blocks of rows among `count`; `wrap` is the row with the element whose offset wraps."""
    size = min(ROWS, count)
    starts = {0, count - size, count // 2, min(max(wrap - size // 2, 0), count - size)}
    return [slice(start, min(start + size, count)) for start in sorted(starts)]


def _differing(op: Op, inputs: Sequence[Any], seed: int, blocks: Sequence[slice]) -> list[str]:
    outputs = call(op.candidate, inputs)
    incoming = random_gradients(outputs, seed)
    whole, found = _results(op, inputs, outputs, incoming), []
    for rows in blocks:
        parts = [_part(item, rows) if isinstance(item, Tensor) else item for item in inputs]
        sent = {name: gradient[rows].clone() for name, gradient in incoming.items()}
        alone = _results(op, parts, call(op.candidate, parts), sent)
        found += [f"{name} in rows {rows.start} to {rows.stop - 1}" for name in alone if not _same(whole, alone, name, rows)]
    return found


def _results(op: Op, inputs: Sequence[Any], outputs: Sequence[Tensor], incoming: Results) -> Results:
    gradients = gradients_of(outputs, dict(leaves(input_names(op.reference, inputs), inputs)), incoming)
    found = {name: output.detach() for name, output in named_outputs(outputs).items()}
    return found | {f"d {name}": gradient for name, gradient in gradients.items()}


def _part(item: Tensor, rows: slice) -> Tensor:
    return item.detach()[rows].clone().requires_grad_(item.requires_grad)


def _same(whole: Results, alone: Results, name: str, rows: slice) -> bool:
    one, other = whole.get(name), alone[name]
    return one is other if one is None or other is None else same_bits(one[rows], other)
