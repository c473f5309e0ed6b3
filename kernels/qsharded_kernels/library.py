"""The compiled library (built by setup.py from csrc/), loaded through ctypes. It is optional."""

import logging
from ctypes import CDLL, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

PATH = Path(__file__).with_name("libqsharded.so")

# what follows mirrors csrc/qsharded.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BAD_DTYPE, BAD_ISA = 1, 2

_log = logging.getLogger(__name__)


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
    _declare(library)
    return library


def _declare(library: CDLL) -> None:
    library.qsharded_cpu_isa.argtypes = []
    library.qsharded_cpu_nf4_quantize.argtypes = [
        *(c_void_p, c_int, c_int64),  # weight, dtype, blocks
        *(c_void_p, c_void_p, c_void_p),  # midpoints, codes, absmax
        *(c_int, c_int),  # threads, isa
    ]
    library.qsharded_cpu_nf4_dequantize.argtypes = [
        *(c_void_p, c_int64, c_int64),  # codes, rows, blocks_per_row
        *(c_void_p, c_int64, c_void_p, c_void_p, c_void_p),  # absmax, its row stride, scales, offset, map
        *(c_void_p, c_void_p, c_int),  # levels, out, dtype
        *(c_int, c_int),  # threads, isa
    ]
