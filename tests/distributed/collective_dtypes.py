"""In which dtypes FSDP2 sends weights and gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

from qsharded.distributed.exact_all_gather import ExactAllGather

Dtypes = dict[str, set[torch.dtype]]


def record_dtypes() -> Dtypes:
    """Filled from now on, by this rank, which ends with its test: of what is gathered, and of the buffers in which
    gradients are reduced over shards and replicas."""
    dtypes: Dtypes = {"gathered": set(), "reduced": set()}
    gather, allocate = ExactAllGather.__call__, DefaultReduceScatter.allocate

    def gather_recorded(self: Any, output_tensor: Tensor, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        dtypes["gathered"].add(input_tensor.dtype)
        return gather(self, output_tensor, input_tensor, *args, **kwargs)

    def allocate_recorded(self: Any, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        dtypes["reduced"].add(dtype)
        return allocate(self, size, dtype=dtype, device=device)

    ExactAllGather.__call__ = gather_recorded
    DefaultReduceScatter.allocate = allocate_recorded
    return dtypes
