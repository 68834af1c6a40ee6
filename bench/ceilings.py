"""What this device can do at most, measured: copy bandwidth and matrix-product rate. Times are judged against these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.timing import median_us

CUDA_COPY_BYTES, CPU_COPY_BYTES = 1 << 30, 64 << 20  # far beyond any cache
CUDA_MATMUL_SIZE, CPU_MATMUL_SIZE = 8192, 1024


@dataclass(frozen=True)
class Ceilings:
    """copy_bytes_per_s counts bytes read plus bytes written; matmul_flops_per_s is 2 n^3 over an n x n product's time."""

    copy_bytes_per_s: float
    matmul_flops_per_s: float
    copied_bytes: int
    matmul_size: int
    matmul_dtype: str

    def floor_us(self, bytes_moved: int, flops: int) -> float:
        """The least time, microseconds, for this traffic and this arithmetic, whichever takes longer."""
        return max(bytes_moved / self.copy_bytes_per_s, flops / self.matmul_flops_per_s) * 1e6

    def bound_by_bytes(self, bytes_moved: int, flops: int) -> bool:
        """Whether it is the traffic that takes longer."""
        return bytes_moved / self.copy_bytes_per_s >= flops / self.matmul_flops_per_s


def measure_ceilings(device: torch.device, samples: int = 15) -> Ceilings:
    """Medians of `samples` calls: on CUDA a 1 GiB copy and an 8192^3 bf16 product, on a CPU 64 MiB and 1024^3 in fp32."""
    cuda = device.type == "cuda"
    copied = CUDA_COPY_BYTES if cuda else CPU_COPY_BYTES
    size = CUDA_MATMUL_SIZE if cuda else CPU_MATMUL_SIZE
    dtype = torch.bfloat16 if cuda else torch.float32
    copy, matmul = copy_of(copied, device), _matmul(size, dtype, device)
    return Ceilings(
        copy_bytes_per_s=2 * copied / median_us(copy, device, samples) * 1e6,
        matmul_flops_per_s=2 * size**3 / median_us(matmul, device, samples) * 1e6,
        copied_bytes=copied,
        matmul_size=size,
        matmul_dtype=str(dtype).removeprefix("torch."),
    )


def copy_of(size_bytes: int, device: torch.device) -> Callable[[], object]:
    """A copy that reads and writes so many bytes each, in whole fp32 numbers."""
    source = torch.ones(size_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _matmul(size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """Normal operands: zeros would draw less power and run faster."""
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=product)
