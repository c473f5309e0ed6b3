"""FSDP2's all-gather without arithmetic on the way, so that packed weights keep every bit.

FSDP2 gathers parameters by copying the shards into one buffer with ``torch._foreach_copy_``. On CUDA that kernel sends
bf16 through fp32, which rewrites NaN patterns, and packed NF4 bytes seen as bf16 are NaN patterns in 0.08% of words
(pytorch#159333, bitsandbytes#1945). :class:`ExactAllGather` has the copy done on integer views instead, by public
means: ``FSDPModule.set_custom_all_gather``.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from qsharded.distributed.copy_engine_gather import copy_engine_gather
from qsharded.utils import collectives

_INTEGER_OF_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _FilledAsIntegers(torch.Tensor):
    """Marks this rank's part of a gather buffer whose bytes were copied in unchanged."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


class _GatherBuffer(torch.Tensor):
    """A gather buffer that meets FSDP2's copy-in and has it done on integer views of inputs and buffer."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is not torch.ops.fsdp.all_gather_copy_in:
                return func(*args, **(kwargs or {}))
            shards, buffer, split_sizes, numel, rank = args
            plain = buffer.as_subclass(torch.Tensor)
            integer = _INTEGER_OF_WIDTH[plain.itemsize]
            func([shard.view(integer) for shard in shards], plain.view(integer), split_sizes, numel, rank)
            return plain.narrow(0, numel * rank, numel).as_subclass(_FilledAsIntegers), plain


class DamagedGather(RuntimeError):
    """This build of PyTorch gathers shards in a way that may change packed bytes."""


class ExactAllGather:
    """FSDP2's all-gather with no arithmetic on the way: integer copies in, bytes over the wire.

    It raises DamagedGather where PyTorch filled the buffer in a way unknown to it: such a run stops before any damage.
    """

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device).as_subclass(_GatherBuffer)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        if type(input_tensor) is not _FilledAsIntegers:
            raise DamagedGather(
                f"PyTorch {torch.__version__} filled FSDP2's gather buffer in a way qsharded does not know, which may "
                "damage packed weights; use a PyTorch version that qsharded supports"
            )
        own, output = input_tensor.as_subclass(torch.Tensor).view(torch.uint8), output_tensor.view(torch.uint8)
        if (gather := copy_engine_gather(group, output.device)) is None:
            return collectives.all_gather_into(output, own, group, async_op)
        gather(output.view(group.size(), -1), own)
        return None  # it is done when the caller's stream comes so far


def use_exact_gather(model: nn.Module) -> None:
    """Set :class:`ExactAllGather` on every FSDP2 module of ``model``."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(ExactAllGather())  # type: ignore[arg-type]  # its base class is private
