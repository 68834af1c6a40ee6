"""Gradients of large matrices, kept as random projections of their rows.

Whole, the oracle's gradients of one probe of a 2B model in full fine-tuning are 7.5 GB, and a gate has tens of probes. Of a
row d of a large matrix d S is kept instead, S [columns, WIDTH] of signs over sqrt(WIDTH), other ones for every tensor and
probe. Arms project their own gradients in the same way. Inner products and squared lengths of projected rows are those of
the rows on average (Johnson and Lindenstrauss 1984; with signs: Achlioptas 2003, doi 10.1016/S0022-0000(03)00025-4), and a
row's squared length is off by a factor whose standard deviation is below sqrt(2 / WIDTH). A scale is kept exactly, and an
element that alone is wrong counts with its full size, wherever it is: no sign is zero.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

LARGE = 1 << 22  # elements: LoRA's matrices are smaller, and kept whole
WIDTH = 64
AT_ONCE = 1 << 26  # elements raised to fp64 at a time
SEPARATOR = "|"  # between a tensor's name, its columns and the seed of its signs; in no parameter's name


@dataclass(frozen=True)
class Projected:
    """What is left of a matrix [rows, columns]: values [rows, WIDTH], and the seed of the signs."""

    values: torch.Tensor
    columns: int
    seed: int

    @property
    def shape(self) -> torch.Size:
        """Of the matrix."""
        return torch.Size((len(self.values), self.columns))

    def numel(self) -> int:
        return self.shape.numel()

    def to(self, device: torch.device) -> Projected:
        return Projected(self.values.to(device), self.columns, self.seed)

    def alike(self, matrix: torch.Tensor) -> torch.Tensor:
        """Another matrix of this shape, projected with the same signs; fp64 [rows, WIDTH]."""
        return project(matrix, self.seed)


Kept = torch.Tensor | Projected


def project(matrix: torch.Tensor, seed: int) -> torch.Tensor:
    """matrix [rows, columns] of any floating dtype -> fp64 [rows, WIDTH] on its device."""
    columns = matrix.shape[1]
    draws = torch.randint(0, 2, (columns, WIDTH), generator=torch.Generator().manual_seed(seed))  # alike on every device
    signs = ((2 * draws - 1).double() / math.sqrt(WIDTH)).to(matrix.device)
    return torch.cat([part.double() @ signs for part in matrix.split(max(1, AT_ONCE // columns))])


def keep(gradients: Mapping[str, torch.Tensor], probe: str) -> dict[str, torch.Tensor]:
    """What goes into a probe's file: large matrices projected, under a name that says how; all others whole. probe: what
    tells this probe from others."""
    found = {}
    for name, gradient in gradients.items():
        if gradient.ndim == 2 and gradient.numel() >= LARGE:
            seed = int.from_bytes(hashlib.blake2b(f"{probe} {name}".encode(), digest_size=7).digest())
            name = SEPARATOR.join((name, str(gradient.shape[1]), str(seed)))
            gradient = project(gradient, seed).to(gradient.dtype)
        found[name] = gradient
    return found


def kept(tensors: Mapping[str, torch.Tensor]) -> dict[str, Kept]:
    """The gradients in a probe's file by parameter name."""
    found: dict[str, Kept] = {}
    for key, values in tensors.items():
        name, *how = key.split(SEPARATOR)
        found[name] = Projected(values, *map(int, how)) if how else values
    return found
