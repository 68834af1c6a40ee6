"""What the tests of kernels for a matrix product share: matrices, a tile of many small blocks, and the truth in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from negative_results.sm121a_matmul.tile import Tile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = Tile(16, 32, 16, warps=4, stages=2)  # many blocks of a small matrix


def normal(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_is_product(got: Tensor, a: Tensor, b: Tensor) -> None:
    """Within what rounding K products and their sum in fp32 can cost, of the fp64 product of the absolute values."""
    truth, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    assert got.shape == truth.shape and got.dtype == a.dtype and got.is_contiguous()
    assert (
        (got.double() - truth).abs() <= (a.shape[1] + 2) * 2.0**-24 * size + torch.finfo(a.dtype).eps * truth.abs()
    ).all()
