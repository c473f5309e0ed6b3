"""What PyTorch does on CUDA and not on a CPU, done on a CPU: every rank of every distributed test runs under it.

gloo ranks take other branches of PyTorch than a GPU's do, and so a run that stops or goes wrong on GPUs passed here:

- FSDP2 brings the root's inputs to the device by DDP's ``_to_kwargs``, which makes new tuples, lists and dicts of them.
  Up to torch 2.11 a root that is called without an input fails there (torch 2.13 looks first).
- ``torch._foreach_copy_`` sends bf16 through fp32, which rewrites NaN patterns (pytorch#159333).
- Optimizers, norms and clipping take their ``foreach`` branch, which treats all parameters in one call.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.utils import _to_kwargs
from torch.optim import optimizer
from torch.utils import _foreach_utils

_on_cpu = FSDPState._root_pre_forward
_with_foreach_kernels = _foreach_utils._get_foreach_kernels_supported_devices


def run_as_cuda() -> None:
    """Have this process, a rank that ends with its test, do as CUDA does."""
    FSDPState._root_pre_forward = root_pre_forward
    torch._foreach_copy_ = foreach_copy_
    _foreach_utils._get_foreach_kernels_supported_devices = foreach_devices
    optimizer._get_foreach_kernels_supported_devices = foreach_devices  # its own import of it


def root_pre_forward(
    state: FSDPState, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The root's inputs, brought to the device as torch 2.11 does it on CUDA; those of other modules as they are."""
    is_root = state._state_ctx.iter_forward_root is None
    args, kwargs = _on_cpu(state, module, args, kwargs)
    if not is_root:
        return args, kwargs
    on_devices, kwargs_on_devices = _to_kwargs(args, kwargs, state._device, False)
    return on_devices[0], kwargs_on_devices[0]  # IndexError where there are neither: so it is in torch 2.11


def foreach_copy_(targets: list[Tensor], sources: list[Tensor], non_blocking: bool = False) -> None:
    """What the CUDA kernel does: bf16 goes through fp32, on whose way back every NaN becomes one and the same."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source.float().bfloat16() if source.dtype == torch.bfloat16 else source)


def foreach_devices() -> list[str]:
    """Where ``foreach`` is the default: on the CPU too."""
    return [*_with_foreach_kernels(), "cpu"]
