"""Calls into the compiled library's CPU part."""

from ctypes import CDLL

import torch
from torch import Tensor

from . import library


def is_available() -> bool:
    """Whether the compiled library was built."""
    return library.load() is not None


def call(function: str, *arguments: Tensor | int | None, threads: int | None = None) -> None:
    """``qsharded_cpu_<function>`` on at most so many threads; None takes PyTorch's number. Tensors become pointers."""
    run = getattr(compiled(), f"qsharded_cpu_{function}")
    status = run(*map(_pointer, arguments), threads or torch.get_num_threads())
    assert status == 0, status


def compiled() -> CDLL:
    """The library."""
    there = library.load()
    assert there is not None, "ask is_available() first"
    return there


def _pointer(argument: Tensor | int | None) -> int | None:
    if not isinstance(argument, Tensor):
        return argument
    assert argument.device.type == "cpu"
    return argument.data_ptr()
