"""The public way to shard a model: :func:`shard`. What is behind it: :mod:`qsharded.distributed.fsdp`."""

from qsharded.distributed.exact_all_gather import DamagedGather, use_exact_gather
from qsharded.distributed.fsdp import shard

__all__ = ["DamagedGather", "shard", "use_exact_gather"]
