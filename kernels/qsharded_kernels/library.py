"""The compiled library (built by setup.py from csrc/), loaded through ctypes. It is optional."""

import logging
from ctypes import CDLL, POINTER, Structure, c_char_p, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

PATH = Path(__file__).with_name("libqsharded.so")

# what follows mirrors csrc/qsharded.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BAD_DTYPE, BAD_ISA, BAD_SIZE = 1, 2, 3
CUDA_ERROR = 1000  # plus a cudaError_t

_log = logging.getLogger(__name__)


class Part(Structure):
    """``qsharded_part``: a weight among several, with the B of its adapter."""

    _fields_ = [
        ("codes", c_void_p),
        ("absmax", c_void_p),
        ("absmax_row_stride", c_int64),
        ("absmax_scales", c_void_p),
        ("absmax_offset", c_void_p),
        ("rows", c_int64),
        ("b", c_void_p),
        ("b_dtype", c_int),
        ("scale", c_float),
        ("rank", c_int64),
        ("column", c_int64),
    ]


@cache
def load() -> CDLL | None:
    """The library, or None where it was not built, which is said once at info level.

    Raises:
        OSError: the library is there and does not load; the loader's own message.
    """
    if not PATH.exists():
        _log.info("No compiled library at %s: Triton and PyTorch serve instead.", PATH)
        return None
    library = CDLL(str(PATH))
    _declare_cpu(library)
    if has_cuda(library):
        _declare_cuda(library)
    return library


def has_cuda(library: CDLL) -> bool:
    """Whether the library was built with nvcc. It says nothing of the machine."""
    return hasattr(library, "qsharded_cuda_probe")


def _declare_cpu(library: CDLL) -> None:
    library.qsharded_cpu_isa.argtypes = []
    library.qsharded_cpu_nf4_quantize.argtypes = [
        *(c_void_p, c_int, c_int64),  # weight, dtype, blocks
        *(c_void_p, c_void_p, c_void_p),  # midpoints, codes, absmax
        *(c_int, c_int),  # isa, threads
    ]
    library.qsharded_cpu_nf4_dequantize.argtypes = [
        *(c_void_p, c_int64, c_int64),  # codes, rows, blocks_per_row
        *(c_void_p, c_int64, c_void_p, c_void_p, c_void_p),  # absmax, its row stride, scales, offset, map
        *(c_void_p, c_void_p, c_int),  # codebook, out, dtype
        *(c_int, c_int),  # isa, threads
    ]
    library.qsharded_cpu_absmax_row_sums.argtypes = [
        *(c_void_p, c_int64, c_int64),  # absmax, rows, blocks_per_row
        *(c_void_p, c_int),  # row_sums, threads
    ]
    library.qsharded_cpu_absmax_offset.argtypes = [
        *(c_void_p, c_int64, c_int64),  # row_sums, rows, values
        *(c_void_p, c_int),  # offset, threads
    ]
    library.qsharded_cpu_absmax_scales.argtypes = [
        *(c_void_p, c_int64, c_int64),  # absmax, first, count
        *(c_void_p, c_void_p, c_int),  # offset, scales, threads
    ]
    library.qsharded_cpu_absmax_encode.argtypes = [
        *(c_void_p, c_int64, c_int64),  # absmax, first, count
        *(c_void_p, c_void_p, c_void_p, c_void_p, c_int),  # offset, scales, thresholds, codes, threads
    ]
    library.qsharded_cpu_absmax_scales_and_codes.argtypes = [
        *(c_void_p, c_int64),  # absmax, count
        *(c_void_p, c_void_p, c_void_p, c_void_p, c_int),  # offset, thresholds, scales, codes, threads
    ]


def _declare_cuda(library: CDLL) -> None:
    library.qsharded_cuda_probe.argtypes = []
    library.qsharded_cuda_error_string.argtypes = [c_int]
    library.qsharded_cuda_error_string.restype = c_char_p
    library.qsharded_cuda_nf4_quantize.argtypes = [
        *(c_void_p, c_int, c_int64),  # weight, dtype, blocks
        *(c_void_p, c_void_p, c_void_p, c_void_p),  # midpoints, codes, absmax, stream
    ]
    library.qsharded_cuda_nf4_dequantize.argtypes = [
        *(c_void_p, c_int64, c_int64),  # codes, rows, blocks_per_row
        *(c_void_p, c_int64, c_void_p, c_void_p, c_void_p),  # absmax, its row stride, scales, offset, map
        *(c_void_p, c_void_p, c_int64, c_int, c_void_p),  # codebook, out, its row stride, dtype, stream
    ]
    library.qsharded_cuda_nf4_dequantize_parts.argtypes = [
        *(POINTER(Part), c_int, c_int64, c_int64),  # parts, how many, blocks_per_row, tail
        *(c_void_p, c_void_p),  # map, codebook
        *(c_void_p, c_int64, c_void_p),  # out, its row stride, stream
    ]
    library.qsharded_cuda_absmax_row_sums.argtypes = [
        *(c_void_p, c_int64, c_int64),  # absmax, rows, blocks_per_row
        *(c_void_p, c_void_p),  # row_sums, stream
    ]
    library.qsharded_cuda_absmax_offset.argtypes = [
        *(c_void_p, c_int64, c_int64),  # row_sums, rows, values
        *(c_void_p, c_void_p),  # offset, stream
    ]
    library.qsharded_cuda_absmax_scales.argtypes = [
        *(c_void_p, c_int64, c_int64),  # absmax, first, count
        *(c_void_p, c_void_p, c_void_p),  # offset, scales, stream
    ]
    library.qsharded_cuda_absmax_encode.argtypes = [
        *(c_void_p, c_int64, c_int64),  # absmax, first, count
        *(c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),  # offset, scales, thresholds, codes, stream
    ]
    library.qsharded_cuda_absmax_scales_and_codes.argtypes = [
        *(c_void_p, c_int64),  # absmax, count
        *(c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),  # offset, thresholds, scales, codes, stream
    ]
    library.qsharded_cuda_nf4_linear_assume.argtypes = [c_int]  # shared_bytes
    library.qsharded_cuda_nf4_linear_assume.restype = None
    library.qsharded_cuda_nf4_linear_workspace.restype = c_int64
    library.qsharded_cuda_nf4_linear_workspace.argtypes = [c_int, c_int64, c_int64, c_int64]  # dtype, m, rows, blocks
    library.qsharded_cuda_nf4_linear.argtypes = [
        *(c_void_p, c_int, c_int64),  # x, dtype, m
        *(c_void_p, c_int64, c_int64),  # codes, rows, blocks_per_row
        *(c_void_p, c_int64, c_void_p, c_void_p, c_void_p),  # absmax, its row stride, scales, offset, map
        *(c_void_p, c_float, c_void_p, c_void_p),  # codebook, factor, bias, y
        *(c_void_p, c_void_p),  # workspace, stream
    ]
    library.qsharded_cuda_adamw8bit.argtypes = [
        *(c_void_p, c_void_p, c_void_p, c_void_p),  # state1, state2, absmax1, absmax2
        *(c_int64, c_int64, c_void_p),  # first_block, blocks, row_of_block
        *(c_void_p, c_void_p, c_void_p),  # table, coefficients, skip
        *(c_void_p, c_void_p, c_void_p, c_void_p),  # map1, map2, search1, search2
        *(c_int, c_void_p),  # dtype, stream
    ]
    library.qsharded_cuda_adamw8bit_alone.argtypes = [
        *(c_void_p, c_void_p, c_int64),  # parameter, gradient, count
        *(c_void_p, c_void_p, c_void_p, c_void_p),  # state1, state2, absmax1, absmax2
        c_void_p,  # coefficients, on the host
        *(c_void_p, c_void_p, c_void_p, c_void_p),  # both maps, search1, search2
        *(c_int, c_void_p),  # dtype, stream
    ]
