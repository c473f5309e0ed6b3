"""The public way to shard a model: :func:`shard`. What is behind it: :mod:`qsharded.distributed.fsdp`."""

from qsharded.distributed.fsdp import DamagedGather, shard, use_exact_gather

__all__ = ["DamagedGather", "shard", "use_exact_gather"]
