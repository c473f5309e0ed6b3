"""Host memory that a GPU copies from and to by itself, given back as soon as its owner is gone.

PyTorch's own pinned memory comes in powers of two and stays with its allocator.
"""

import weakref

import torch
from torch import Tensor

_PAGE = 4096


def host_bytes(count: int) -> Tensor:
    """``count`` zero bytes that begin on a page of host memory and share none of their pages."""
    memory = torch.zeros(count + 2 * _PAGE, dtype=torch.uint8)
    start = -memory.data_ptr() % _PAGE
    return memory[start : start + count]


def lock(memory: Tensor, device: torch.device, owner: object) -> None:
    """Page-lock what :func:`host_bytes` gave for copies to and from a GPU, until ``owner`` is gone.

    Raises:
        RuntimeError: CUDA will not lock so much; its own words.
    """
    address, size = memory.data_ptr(), -(-memory.nbytes // _PAGE) * _PAGE
    _check(torch.cuda.cudart().cudaHostRegister(address, size, 0))
    # It holds the memory, which must not go before the lock. At exit the whole process gives back everything.
    weakref.finalize(owner, _unlock, memory, device).atexit = False


def _unlock(memory: Tensor, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a copy may be under way
    _check(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr()))


def _check(result: object) -> None:
    code = int(result)  # type: ignore[call-overload]
    if code:
        raise torch.cuda.CudaError(code)
