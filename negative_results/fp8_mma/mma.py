"""The CUDA C++ kernel: how it is built for the GPU that is here, and how it is launched.

It is built when it is first wanted, by nvcc and ninja through torch.utils.cpp_extension, into torch's folder for extensions
in the user's cache, where torch's lock keeps processes apart. It has a C interface and needs nothing of torch's, so it is
built in seconds and called through ctypes.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("product.cu")
TILE_M, TILE_N, TILE_K = 128, 128, 64
STAGES = 3  # with these tiles 48 KiB: two blocks on an SM of Blackwell's, and no need to ask for more than the usual limit
WARPS_M, WARPS_N = 2, 4
GROUP_M = 8
SIZES = {"TILE_M": TILE_M, "TILE_N": TILE_N, "TILE_K": TILE_K, "STAGES": STAGES, "WARPS_M": WARPS_M, "WARPS_N": WARPS_N,
         "GROUP_M": GROUP_M}  # fmt: skip
FLAGS = ("-O3", "-std=c++17", *(f"-D{name}={value}" for name, value in SIZES.items()))
ALIGNED = 16  # K, in elements; and where codes begin, in bytes
OUTPUTS = (torch.bfloat16, torch.float32)
LIMIT = 2**31  # of each size, and of the blocks of a grid
BUILD_ERRORS = (RuntimeError, OSError, subprocess.SubprocessError)


def target_of(capability: tuple[int, int]) -> str:
    """nvcc's name of a GPU, with the instructions that only it has: sm_89, sm_90a, sm_121a."""
    major, minor = capability
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def blocks_for(M: int, N: int) -> int:
    """Blocks of one launch: a tile of the output each."""
    return -(-M // TILE_M) * -(-N // TILE_N)


def unavailable(device: torch.device) -> str | None:
    """None once the kernel is built and loaded for this CUDA device, else in words why it can't be."""
    target = target_of(torch.cuda.get_device_capability(device))
    reason = missing_tool(target)
    if reason is None:
        try:
            _library(target)
        except BUILD_ERRORS as error:
            reason = f"its CUDA kernel can't be built for {target}: {_cause(error)}"
    return reason


def missing_tool(target: str) -> str | None:
    """None when there is all that the build needs, else what is missing."""
    extension = _cpp_extension()
    if extension is None:
        return "its CUDA kernel is built by torch.utils.cpp_extension, which needs the package setuptools"
    if not extension.is_ninja_available():
        return "its CUDA kernel is built by ninja, which is not installed (pip install ninja)"
    if shutil.which(extension.get_cxx_compiler()) is None:
        return f"its CUDA kernel needs a C++ compiler; {extension.get_cxx_compiler()} is not installed"
    nvcc = Path(extension.CUDA_HOME or "") / "bin" / "nvcc"
    if extension.CUDA_HOME is None or not nvcc.is_file():
        return "its CUDA kernel is built by nvcc, and no CUDA toolkit was found: CUDA_HOME can name one"
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False).stdout.split()
    if target.removesuffix("a") not in known:
        return f"its CUDA kernel needs an nvcc that knows {target}, and {nvcc} does not"
    return None


def _cpp_extension() -> ModuleType | None:
    try:
        from torch.utils import cpp_extension
    except ImportError:
        return None
    return cpp_extension


def _cause(error: BaseException) -> str:
    """The compiler's first error in what a failed build said, or its first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[0] if lines else type(error).__name__)[:300]


@functools.cache
def _library(target: str) -> ctypes.CDLL:
    """The kernel for one target, built where it is not or is out of date. Raises one of BUILD_ERRORS."""
    from torch.utils.cpp_extension import get_default_build_root, load

    name = f"isoloss_fp8_mma_{target}"
    folder = Path(get_default_build_root()) / name
    folder.mkdir(parents=True, exist_ok=True)
    number = target.removeprefix("sm_")
    flags = [*FLAGS, f"-gencode=arch=compute_{number},code={target}"]
    load(name, [str(SOURCE)], extra_cuda_cflags=flags, build_directory=str(folder), is_python_module=False)
    library = ctypes.CDLL(str(folder / f"{name}.so"))
    library.isoloss_fp8_product.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int] * 5 + [ctypes.c_void_p]
    library.isoloss_fp8_product.restype = ctypes.c_int
    return library


def mma_product(codes_x: Tensor, scales_x: Tensor, codes_w: Tensor, scales_w: Tensor, dtype: torch.dtype) -> Tensor:
    """codes_x [M, K] uint8, scales_x [M] fp32, codes_w [N, K], scales_w [N] -> [M, N], bfloat16 or float32; all on one GPU.

    The bits of `reference.product_reference` wherever the sums need no rounding. Raises ValueError for other sizes or
    dtypes, RuntimeError for a launch that fails, and what the build raises where there was none before.
    """
    check_sizes(codes_x, scales_x, codes_w, scales_w, dtype)
    (M, K), N = codes_x.shape, len(codes_w)
    out = torch.empty((M, N), dtype=dtype, device=codes_x.device)
    if M == 0 or N == 0:
        return out
    library = _library(target_of(torch.cuda.get_device_capability(codes_x.device)))
    tensors = [_aligned(tensor) for tensor in (codes_x, codes_w, scales_x, scales_w)]
    with torch.cuda.device(codes_x.device):
        stream = torch.cuda.current_stream().cuda_stream
        pointers = [tensor.data_ptr() for tensor in (*tensors, out)]
        error = library.isoloss_fp8_product(*pointers, M, N, K, blocks_for(M, N), dtype == torch.float32, stream)
    if error:
        raise RuntimeError(f"fp8 product of [{M}, {K}] and [{N}, {K}]: the launch failed with cudaError {error}")
    return out


def check_sizes(codes_x: Tensor, scales_x: Tensor, codes_w: Tensor, scales_w: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError for what the kernel can't multiply."""
    shapes = f"{list(codes_x.shape)} and {list(codes_w.shape)} with scales {list(scales_x.shape)} and {list(scales_w.shape)}"
    if codes_x.ndim != 2 or codes_w.ndim != 2 or codes_x.shape[1] != codes_w.shape[1]:
        raise ValueError(f"fp8 product: codes [M, K] and [N, K] are expected, not {shapes}")
    if scales_x.shape != codes_x.shape[:1] or scales_w.shape != codes_w.shape[:1]:
        raise ValueError(f"fp8 product: a scale a row is expected, not {shapes}")
    (M, K), N = codes_x.shape, len(codes_w)
    if K % ALIGNED or K == 0 or N % 2:
        raise ValueError(f"fp8 product: K must be a multiple of {ALIGNED} and N even, not {K} and {N}")
    if max(M, N, K, blocks_for(M, N)) >= LIMIT:
        raise ValueError(f"fp8 product: sizes and tiles must be below 2^31, not {shapes}")
    if dtype not in OUTPUTS:
        raise ValueError(f"fp8 product: {dtype} is not one of {', '.join(map(str, OUTPUTS))}")
    if {codes_x.dtype, codes_w.dtype} != {torch.uint8} or {scales_x.dtype, scales_w.dtype} != {torch.float32}:
        raise ValueError("fp8 product: codes are uint8 and scales float32")


def _aligned(tensor: Tensor) -> Tensor:
    """The same values, contiguous and from an address that cp.async can take."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNED == 0 else tensor.clone()
