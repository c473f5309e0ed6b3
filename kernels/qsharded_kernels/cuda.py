"""The compiled library's CUDA part: whether it runs here, and calls into it."""

import logging
from contextlib import AbstractContextManager, nullcontext
from ctypes import CDLL
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import library

_log = logging.getLogger(__name__)

# what the library checks, by the function
_MOST_WEIGHTS = "a weight has at most 2^37 elements: shard it"
_ALIGNED = "and the rows of the output begin a multiple of 16 bytes apart"
_LIMITS = {
    "nf4_linear": f"{_MOST_WEIGHTS}; in_features is at most 2^20, and there are at most 2^31 - 1 tokens",
    "nf4_dequantize": f"{_MOST_WEIGHTS}; {_ALIGNED}",
    "nf4_dequantize_parts": f"1 to 4 weights; {_MOST_WEIGHTS}; a tail of whole 16 bytes; {_ALIGNED}, with room for it",
}


def is_available(device: torch.device | str = "cuda") -> bool:
    """Whether the CUDA kernels were built and run on ``device``. Where they were built and do not, a warning says why,
    once."""
    compiled = library.load()
    if compiled is None or not library.has_cuda(compiled) or not torch.cuda.is_available():
        return False
    index = torch.device(device).index
    return _runs_on(compiled, torch.cuda.current_device() if index is None else index)


@cache
def _runs_on(compiled: CDLL, device_index: int) -> bool:
    with torch.cuda.device(device_index):
        result = compiled.qsharded_cuda_probe()
    if result != 0:
        reason = compiled.qsharded_cuda_error_string(result).decode()
        _log.warning(
            "The compiled CUDA kernels do not run on cuda:%d: %s. Triton serves instead.", device_index, reason
        )
    return result == 0


def call(function: str, *arguments: Tensor | float | None) -> None:
    """Queue ``qsharded_cuda_<function>`` on the current stream of the first tensor's device. Tensors become pointers.

    Raises:
        RuntimeError: CUDA refused the launch; its own words.
        ValueError: sizes that the kernel does not take.
    """
    index = next(argument.get_device() for argument in arguments if isinstance(argument, Tensor))
    call_on(index, function, *[_pointer(argument, index) for argument in arguments])


def call_on(index: int, function: str, *arguments: Any) -> None:
    """The same on device ``index``, with pointers in the place of tensors."""
    compiled = library.load()
    assert compiled is not None, "ask is_available() first"
    with _current(index):
        stream = torch._C._cuda_getCurrentRawStream(index)  # as Triton asks for it: several times faster than a Stream
        result = getattr(compiled, f"qsharded_cuda_{function}")(*arguments, stream)
    if result != 0:
        _raise_for(result, function, compiled)


def _current(index: int) -> AbstractContextManager[object]:
    """The device made the current one; it nearly always is."""
    return nullcontext() if torch.cuda.current_device() == index else torch.cuda.device(index)


def _pointer(argument: Tensor | float | None, device_index: int) -> float | None:
    if not isinstance(argument, Tensor):
        return argument
    assert argument.get_device() == device_index, (argument.device, device_index)
    return argument.data_ptr()


def _raise_for(result: int, function: str, compiled: CDLL) -> None:
    if result >= library.CUDA_ERROR:
        raise RuntimeError(f"CUDA: {compiled.qsharded_cuda_error_string(result).decode()}")
    if result == library.BAD_SIZE:
        raise ValueError(f"{function}: sizes that its kernel does not take; {_LIMITS.get(function, _MOST_WEIGHTS)}")
    assert result == 0, result
