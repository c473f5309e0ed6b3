"""Which implementation steps the optimizer on a device, and the tables that it takes."""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from qsharded.quant import backends, blockwise8
from qsharded_kernels import cuda


@cache
def optimizer_kernels(device: torch.device) -> ModuleType | None:
    """The compiled kernels or Triton's; None where plain PyTorch has to do, as on every CPU.

    Raises:
        ValueError: QSHARDED_BACKEND asks for compiled kernels that are not there.
    """
    wanted = backends.wanted_backend()
    if device.type != "cuda" or wanted == "reference":
        return None
    if wanted != "triton" and cuda.is_available(device):
        from qsharded_kernels import cuda_adamw8bit

        return cuda_adamw8bit
    if wanted == "compiled":
        raise ValueError(f"QSHARDED_BACKEND=compiled does not serve {device} here; what does: triton, reference")
    from qsharded_kernels import triton_adamw8bit  # here: Triton loads slowly

    return triton_adamw8bit


def step_tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The signed and the unsigned map, and the thresholds of each."""
    maps = blockwise8.dynamic_map(True, device), blockwise8.dynamic_map(False, device)
    return *maps, blockwise8.thresholds(True, device), blockwise8.thresholds(False, device)
