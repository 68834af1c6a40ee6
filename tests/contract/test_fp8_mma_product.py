"""fp8_mma's product: the CUDA kernel on a CPU and on a GPU against exact sums, and what it is launched with.

On a CPU the kernel runs with stand-ins for its few instructions of the GPU's own (tests/contract/fp8_mma_host), a thread for
each of its threads. Which numbers meet, the ring of shared memory, the ends of matrices and the order of tiles are its own.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from negative_results.fp8_mma import mma
from negative_results.fp8_mma.kernel import product, quantised, scaled_mm_product, uses_mma
from negative_results.fp8_mma.mma import FLAGS, SOURCE, blocks_for, check_sizes, mma_product, target_of, unavailable
from negative_results.fp8_mma.reference import E4M3, decode, exact_sums, product_reference, quantise_rows_reference

HOST = Path(__file__).with_name("fp8_mma_host")
MMA_K = 32  # of one instruction
Operands = tuple[Tensor, Tensor, Tensor, Tensor]


def whole_numbers(M: int, N: int, K: int, powers: bool = False) -> Operands:
    """Codes of small whole numbers, whose partial sums stay below 2^13 in any order, and scales; powers: scales of two's.

    Below 2^14 a whole number needs no more than the 13 bits after the first that the narrowest of tensor cores keep.
    """
    largest = max(size for size in (1, 2, 4) if size * size * K < 2**13)
    generator = torch.Generator().manual_seed(M + N + K)
    x, w = (torch.randint(-largest, largest + 1, (rows, K), generator=generator).float() for rows in (M, N))
    scales = [torch.rand(rows, generator=generator) + 0.5 for rows in (M, N)]
    if powers:
        scales = [torch.exp2(torch.randint(-3, 4, (rows,), generator=generator).float()) for rows in (M, N)]
    return x.to(E4M3).view(torch.uint8), scales[0], w.to(E4M3).view(torch.uint8), scales[1]


def test_whole_numbers_have_the_same_bits_in_any_order():
    x, of_x, w, of_w = whole_numbers(19, 34, 512)
    forward = decode(x) @ decode(w).t()
    order = torch.randperm(512, generator=torch.Generator().manual_seed(1))
    chained = torch.zeros_like(forward)
    for k in order.tolist():
        chained += decode(x)[:, k, None] * decode(w)[None, :, k]
    assert torch.equal(forward, chained) and torch.equal(forward.double(), exact_sums(x, w))
    assert forward.abs().max() > 100
    assert torch.equal(product_reference(x, of_x, w, of_w, torch.float32), forward * of_x[:, None] * of_w)


def test_sums_in_fp64_are_exact():
    x, w = (torch.randint(0, 256, (rows, 96), generator=torch.Generator().manual_seed(rows)).byte() for rows in (5, 7))
    x, w = (codes.masked_fill(codes % 128 == 127, 0) for codes in (x, w))
    whole = [[[int(value * 512) for value in row] for row in decode(codes).tolist()] for codes in (x, w)]
    want = [[sum(a * b for a, b in zip(row, col, strict=True)) for col in whole[1]] for row in whole[0]]
    assert [[int(value) for value in row] for row in (exact_sums(x, w) * 512**2).tolist()] == want


@pytest.fixture(scope="module", params=["", "-D__CUDA_ARCH__=890"], ids=["sums in place", "sums promoted"])
def on_host(request, tmp_path_factory) -> Callable[..., Tensor]:
    """The kernel as the host's compiler makes it, as a function of operands."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed here")
    folder = tmp_path_factory.mktemp("host")
    shutil.copy(SOURCE, folder)  # away from its own primitives
    defines = [flag for flag in (*FLAGS, request.param) if flag.startswith("-D")]
    command = ["g++", "-std=c++20", "-O1", "-pthread", "-Wno-unknown-pragmas", f"-I{folder}", f"-I{HOST}", *defines]
    subprocess.run([*command, HOST / "main.cpp", "-o", folder / "host"], check=True, timeout=120)

    def run(x: Tensor, of_x: Tensor, w: Tensor, of_w: Tensor) -> Tensor:
        for name, tensor in zip(("a", "scale_a", "b", "scale_b"), (x, of_x, w, of_w), strict=True):
            tensor.numpy().tofile(folder / name)
        M, N, K = len(x), len(w), x.shape[1]
        sizes = map(str, (M, N, K, blocks_for(M, N)))
        subprocess.run([folder / "host", folder, *sizes], check=True, timeout=120)
        return torch.from_numpy(np.fromfile(folder / "out", dtype=np.float32)).view(M, N)

    return run


@pytest.mark.parametrize(
    ("M", "N", "K"),
    [(16, 16, 16), (128, 128, 64), (1, 2, 32), (37, 48, 80), (130, 144, 208), (257, 16, 336), (1100, 260, 16)],
)
def test_the_kernel_on_a_cpu_has_the_emulation_s_bits(on_host, M, N, K):
    operands = whole_numbers(M, N, K)
    assert torch.equal(on_host(*operands), product_reference(*operands, torch.float32))


def test_the_kernel_on_a_cpu_reads_every_code(on_host):
    x, w = torch.arange(256).byte().repeat(2, 1), torch.full((2, 256), 0x38, dtype=torch.uint8)  # 0x38: one
    x[0, 127] = x[0, 255] = x[1, :] = 0
    one = torch.ones(2)
    got = on_host(x, one, w, one)
    assert torch.equal(got, torch.zeros(2, 2)), "every number and its negative"
    x[1, 200] = 0x7F
    assert on_host(x, one, w, one).isnan().tolist() == [[False] * 2, [True] * 2]


def test_names_of_targets_and_who_has_the_kernel():
    names = {(8, 9): "sm_89", (9, 0): "sm_90a", (10, 0): "sm_100a", (12, 0): "sm_120a", (12, 1): "sm_121a"}
    assert {capability: target_of(capability) for capability in names} == names
    assert [capability for capability in names if uses_mma(capability)] == [(8, 9), (12, 0), (12, 1)]


def test_a_block_for_every_tile():
    assert [blocks_for(*size) for size in ((1, 1), (128, 128), (129, 128), (5376, 6144), (5376, 6160))] == [
        1,
        1,
        2,
        2016,
        2058,
    ]
    assert mma.TILE_K % MMA_K == 0 and mma.STAGES * (mma.TILE_M + mma.TILE_N) * mma.TILE_K <= 48 * 1024


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(4, 24, dtype=torch.uint8), "w": torch.zeros(6, 24, dtype=torch.uint8)}, "multiple of 16"),
        ({"w": torch.zeros(6, 16, dtype=torch.uint8)}, r"codes \[M, K\] and \[N, K\]"),
        ({"w": torch.zeros(5, 32, dtype=torch.uint8), "of_w": torch.ones(5)}, "N even"),
        ({"of_x": torch.ones(5)}, "a scale a row"),
        ({"x": torch.zeros(4, 32, dtype=torch.int8)}, "codes are uint8"),
        ({"of_w": torch.ones(6, dtype=torch.float64)}, "scales float32"),
        ({"dtype": torch.float16}, "float16 is not one of"),
        ({"w": torch.zeros(2**31, 1, dtype=torch.uint8, device="meta").expand(2**31, 32)}, "a scale a row"),
        ({"w": torch.zeros(1, 32, dtype=torch.uint8, device="meta").expand(2**31, 32),
          "of_w": torch.ones(1, device="meta").expand(2**31)}, "below 2\\^31"),
    ],
)  # fmt: skip
def test_what_the_kernel_can_not_multiply_is_refused(change, words):
    given = {"x": torch.zeros(4, 32, dtype=torch.uint8), "of_x": torch.ones(4), "w": torch.zeros(6, 32, dtype=torch.uint8),
             "of_w": torch.ones(6), "dtype": torch.float32}  # fmt: skip
    check_sizes(*given.values())
    with pytest.raises(ValueError, match=words):
        check_sizes(*(given | change).values())


def accumulation_bound(x: Tensor, w: Tensor, fraction_bits: int, inside: int) -> Tensor:
    """The most, [T, O] fp64, by which a tensor core's sums of decode(x) [T, K] and decode(w) [O, K] can be off.

    An instruction shifts 32 products and the sum so far to the exponent of the largest of them, cuts off what is more than
    `fraction_bits` behind its first bit, adds, and cuts the sum: 34 times less than a unit. Some do that in two halves.
    After `inside` products a sum is added to others in fp32.
    """
    x, w = decode(x).double(), decode(w).double()
    total = torch.zeros(len(x), len(w), dtype=torch.float64)
    bound, part, of_part = total.clone(), total.clone(), total.clone()
    for k in range(0, x.shape[1], MMA_K):
        if k % inside == 0:
            part, of_part = torch.zeros_like(total), torch.zeros_like(total)
        a, b = x[:, k : k + MMA_K], w[:, k : k + MMA_K].t()
        largest = part.abs() + of_part + a.abs() @ b.abs()
        added = 2 * 34 * 2.0**-fraction_bits * largest
        part, total, of_part, bound = part + a @ b, total + a @ b, of_part + added, bound + added
        if (k + MMA_K) % inside == 0:
            bound = bound + 2.0**-23 * (total.abs() + bound)
    return bound


def cut(values: Tensor, exponent: Tensor, bits: int) -> Tensor:
    """Towards zero, to `bits` behind the first bit of 2^exponent."""
    return torch.ldexp(torch.ldexp(values, bits - exponent).trunc(), exponent - bits)


def modelled_sums(x: Tensor, w: Tensor, fraction_bits: int) -> Tensor:
    """Sums as a tensor core with so few bits would make them, in fp64; x [T, K], w [O, K] codes."""
    x, w = decode(x).double(), decode(w).double()
    total = torch.zeros(len(x), len(w), dtype=torch.float64)
    for k in range(0, x.shape[1], MMA_K):
        terms = torch.cat([total[..., None], x[:, None, k : k + MMA_K] * w[None, :, k : k + MMA_K]], dim=-1)
        exponent = torch.frexp(terms.abs().amax(-1))[1] - 1
        total = cut(terms, exponent[..., None], fraction_bits).sum(-1)
        total = cut(total, torch.frexp(total)[1] - 1, min(fraction_bits, 23))
    return total


def random_codes(T: int, O: int, K: int) -> Operands:
    generator = torch.Generator().manual_seed(7)
    x, w = (torch.randn(rows, K, generator=generator) for rows in (T, O))
    return *quantise_rows_reference(x), *quantise_rows_reference(w)


@pytest.mark.parametrize("bits", [13, 23, 25])
def test_the_bound_holds_for_a_tensor_core_of_so_many_bits_and_sees_a_product_that_is_left_out(bits):
    x, _, w, _ = random_codes(24, 16, 512)
    truth, bound = exact_sums(x, w), accumulation_bound(x, w, bits, 512)
    error = (modelled_sums(x, w, bits) - truth).abs()
    assert (error <= bound).all() and error.max() > 0
    if bits > 13:
        lacking = x.clone()
        lacking[:, 100] = 0
        far = (exact_sums(lacking, w) - truth).abs() > bound
        assert far.float().mean() > 0.9


GPU = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with e4m3"
)


ARMS = {"mma": mma_product, "scaled_mm": scaled_mm_product}


def on_gpu(arm: str, operands: Operands, dtype: torch.dtype) -> Tensor:
    device = torch.device("cuda")
    if arm == "mma" and (reason := unavailable(device)):
        pytest.skip(reason)
    if arm == "scaled_mm" and uses_mma(torch.cuda.get_device_capability()):
        pytest.skip("this GPU has the kernel")
    return ARMS[arm](*(operand.to(device) for operand in operands), dtype).cpu()


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("shape", [(37, 48, 80), (128, 128, 64), (500, 272, 2048), (1100, 2064, 6144)], ids=str)
@pytest.mark.parametrize(
    ("arm", "dtype"), [("mma", torch.float32), ("mma", torch.bfloat16), ("scaled_mm", torch.bfloat16)], ids=str
)
def test_whole_numbers_have_the_emulation_s_bits_on_tensor_cores(arm, dtype, shape):
    # a library may multiply the scales in another order; with powers of two that shows no more than the order of the sum
    operands = whole_numbers(*shape, powers=arm == "scaled_mm")
    assert torch.equal(on_gpu(arm, operands, dtype), product_reference(*operands, dtype))


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("arm", ARMS)
def test_random_operands_are_as_near_to_the_exact_sums_as_tensor_cores_promise(arm):
    x, _, w, _ = random_codes(130, 272, 512)
    dtype = torch.float32 if arm == "mma" else torch.bfloat16
    got = on_gpu(arm, (x, torch.ones(130), w, torch.ones(272)), dtype).double()
    truth = exact_sums(x, w)
    if arm == "mma":
        ada = torch.cuda.get_device_capability() == (8, 9)
        bound = accumulation_bound(x, w, 13 if ada else 23, mma.TILE_K if ada else 512)
    else:
        bound = accumulation_bound(x, w, 13, 512) + 2.0**-8 * truth.abs()
    assert ((got - truth).abs() <= bound).all()


@pytest.mark.gpu
@GPU
def test_every_bf16_number_is_quantised_as_on_a_cpu():
    x = torch.arange(-(2**15), 2**15).short().view(torch.bfloat16)
    x = x[x.isfinite()].view(-1, 16)
    for rows in (x, x.t().contiguous(), x.float() * 1.1):
        for mine, want in zip(quantised(rows.cuda()), quantise_rows_reference(rows), strict=True):
            assert torch.equal(mine.cpu(), want)


@pytest.mark.gpu
@GPU
def test_the_arm_of_this_gpu_repeats_itself_and_takes_no_rows():
    operands = [operand.cuda() for operand in random_codes(300, 160, 208)]
    if uses_mma(torch.cuda.get_device_capability()) and (reason := unavailable(torch.device("cuda"))):
        pytest.skip(reason)
    first = product(*operands, torch.bfloat16)
    assert all(torch.equal(product(*operands, torch.bfloat16), first) for _ in range(5))
    none = product(operands[0][:0], operands[1][:0], *operands[2:], torch.bfloat16)
    assert none.shape == (0, 160) and none.dtype == torch.bfloat16
