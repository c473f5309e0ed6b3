"""Our own kernels that run on a device, by name: the modules that share one signature."""

from types import ModuleType

import torch

from qsharded_kernels import cpu_nf4, cuda, cuda_nf4


def on(device: torch.device) -> dict[str, ModuleType]:
    """Name -> module with ``quantize`` and ``dequantize``."""
    if device.type == "cpu":
        return {"compiled": cpu_nf4} if cpu_nf4.is_available() else {}
    from qsharded_kernels import triton_nf4

    compiled = {"cuda": cuda_nf4} if cuda.is_available(device) else {}
    return compiled | {"triton": triton_nf4}
