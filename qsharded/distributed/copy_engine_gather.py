"""An all-gather within a machine by the GPUs' copy engines, which leaves all SMs to the products that run beside it.

NCCL's gather is a kernel: it takes SMs from the matrix products that it is meant to hide behind. Here each rank puts
its bytes where its peers can read them (PyTorch's symmetric memory), all wait for one another, and each copies the
others' bytes to itself. Large gathers go through two slots in turn: who has passed the barrier of one round has read
the slot of the round before it, so that the slot can be written again after it.

Axes: W ranks, B bytes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from qsharded.utils import collectives

SLOT_BYTES = 32 << 20
_CHOICES = ("auto", "nccl")
_FIRST_MEASURED = (9, 0)  # on older cards nobody has measured it


class Workspace(Protocol):
    """Memory that all ranks can read, as ``torch.distributed._symmetric_memory`` gives it."""

    def get_buffer(self, rank: int, sizes: list[int], dtype: torch.dtype, storage_offset: int) -> Tensor: ...

    def barrier(self, channel: int) -> None: ...


class CopyEngineGather:
    """Gathers within one group of ranks. Every rank makes the same calls in the same order."""

    def __init__(self, workspace: Workspace, rank: int, stream: torch.cuda.Stream | None) -> None:
        self._workspace, self._rank, self._stream, self._rounds = workspace, rank, stream, 0

    def __call__(self, output_WB: Tensor, own_B: Tensor) -> None:
        """Fill ``output`` (uint8) with every rank's ``own``, but for its own row, which is there already."""
        with self._in_turn():
            for start in range(0, own_B.numel(), SLOT_BYTES):
                part = slice(start, start + SLOT_BYTES)
                self._round(output_WB[:, part], own_B[part])

    def _round(self, output_WB: Tensor, own_B: Tensor) -> None:
        slot = self._rounds % 2 * SLOT_BYTES
        self._rounds += 1
        self._part_of(self._rank, own_B.numel(), slot).copy_(own_B)
        self._workspace.barrier(channel=0)
        ranks = output_WB.shape[0]
        for step in range(1, ranks):
            peer = (self._rank + step) % ranks  # not all from the same one
            output_WB[peer].copy_(self._part_of(peer, own_B.numel(), slot))

    def _part_of(self, rank: int, size: int, slot: int) -> Tensor:
        return self._workspace.get_buffer(rank, [size], torch.uint8, slot)

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        """FSDP2 gathers on more than one stream; the slots are used in the order of the calls."""
        if self._stream is None:
            yield
            return
        caller = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            yield
        caller.wait_stream(self._stream)


@cache
def copy_engine_gather(group: dist.ProcessGroup, device: torch.device) -> CopyEngineGather | None:
    """The one of ``group``, on whose ranks it may serve; None where one of them can not. Every rank calls this."""
    if device.type != "cuda" or not _agreed(_is_able(group, device), group, device):
        return None
    workspace = _workspace(group, device)
    if not _agreed(workspace is not None, group, device) or workspace is None:
        return None
    return CopyEngineGather(workspace, group.rank(), torch.cuda.Stream(device))


def wanted_gather() -> str:
    """What QSHARDED_GATHER says: "auto" (the default), or "nccl".

    Raises:
        ValueError: it says something else.
    """
    wanted = os.environ.get("QSHARDED_GATHER", "auto")
    if wanted not in _CHOICES:
        raise ValueError(f"QSHARDED_GATHER must be one of {', '.join(_CHOICES)}, got {wanted!r}")
    return wanted


def _is_able(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether all ranks are on this machine, and its GPUs read each other's memory."""
    if wanted_gather() == "nccl" or os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
        return False
    if torch.cuda.get_device_capability(device) < _FIRST_MEASURED:
        return False
    others = set(range(torch.cuda.device_count())) - {device.index}
    return group.size() > 1 and all(torch.cuda.can_device_access_peer(device, other) for other in others)


def _workspace(group: dist.ProcessGroup, device: torch.device) -> Workspace | None:
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # nothing here uses it, and few machines offer it
    try:
        from torch.distributed import _symmetric_memory

        memory = _symmetric_memory.empty(2 * SLOT_BYTES, dtype=torch.uint8, device=device)
        workspace: Workspace = _symmetric_memory.rendezvous(memory, group)
    except (ImportError, RuntimeError):  # a machine that does not let processes share memory, say
        return None
    return workspace


def _agreed(able: bool, group: dist.ProcessGroup, device: torch.device) -> bool:
    return not collectives.largest(int(not able), device, group)
