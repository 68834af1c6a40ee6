"""beta and the log decay of a gated-delta layer in one launch each way."""

from __future__ import annotations

import torch

from kernels.contract import Exactness, Needs, Op, Optimization, Workload

from . import patch
from .reference import decay_gates_reference

WORKLOADS = (
    Workload("2B, pack 5376, frozen", {"T": 5376, "H": 16, "trained": 0}),
    Workload("2B, pack 5376, trained", {"T": 5376, "H": 16, "trained": 1}),
    Workload("4B, pack 5376, frozen", {"T": 5376, "H": 32, "trained": 0}),
    Workload("small", {"T": 96, "H": 4, "trained": 1}, "float32", small=True),
    Workload("small, ragged", {"T": 37, "H": 3, "trained": 1}, "float32", small=True),
    Workload("small, ragged, frozen", {"T": 41, "H": 5, "trained": 0}, "float32", small=True),
)


def _candidate(
    a: torch.Tensor, b: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from .kernel import decay_gates

    return decay_gates(a, b, A_log, dt_bias)


def _inputs(workload: Workload, device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    """a, b [1, T, H], wide enough for both ends of the sigmoid and for a softplus that is its argument; A_log and dt_bias
    [H] as transformers draws them, log of 0 to 16 and about 1."""
    generator = torch.Generator(device).manual_seed(seed)
    shape, dtype = workload.shape, getattr(torch, workload.dtype)

    def drawn(*sizes: int, scale: float, gradient: bool = True) -> torch.Tensor:
        values = torch.randn(sizes, generator=generator, device=device) * scale
        return values.to(dtype).requires_grad_(gradient)

    a, b = (drawn(1, shape["T"], shape["H"], scale=scale) for scale in (8.0, 4.0))
    A_log = (16 * torch.rand(shape["H"], generator=generator, device=device) + 0.01).log().to(dtype)
    dt_bias = 1 + drawn(shape["H"], scale=0.3, gradient=False)
    trained = bool(shape["trained"])
    return a, b, A_log.requires_grad_(trained), dt_bias.requires_grad_(trained)


def _bytes_moved(workload: Workload) -> int:
    """Forward reads a and b and writes beta and g; backward reads a, b and both gradients and writes those of a and b. g and
    its gradient are fp32."""
    item = getattr(torch, workload.dtype).itemsize
    return (3 * item + 4 + 5 * item + 4) * workload.shape["T"] * workload.shape["H"]


def _flops(workload: Workload) -> int:
    """Forward 10 an element, backward 16."""
    return 26 * workload.shape["T"] * workload.shape["H"]


OPTIMIZATION = Optimization(
    name="decay_gates",
    summary="sigmoid, softplus and decay of every gated-delta layer in one Triton kernel each way",
    exactness=Exactness.ROUNDING,
    why_exact=(
        "the same formulas in fp32, rounded where PyTorch rounds forward; backward the sigmoid's derivative is taken of the "
        "sigmoid before it is rounded to the compute dtype, and gradients of A_log and dt_bias are sums in another order"
    ),
    eligible=patch.eligible,
    apply=patch.apply,
    op=Op(decay_gates_reference, _candidate, _inputs, WORKLOADS, _bytes_moved, _flops),
    needs=Needs(triton=True),
    source=("Yang, Kautz and Hatamizadeh 2024, Gated Delta Networks, https://arxiv.org/abs/2412.06464",),
)
