"""The gather by copy engines, on memory that processes share through a file, with the process group's barrier."""

import itertools
import time
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from qsharded.distributed import copy_engine_gather, exact_all_gather
from qsharded.distributed.copy_engine_gather import CopyEngineGather, wanted_gather
from tests.distributed.harness import run_ranks
from tests.distributed.test_exact_gather import damage, modes


class SharedFile:
    """A workspace; one rank is slow to read what its peers have written."""

    def __init__(self, folder: Path, size: int) -> None:
        shape = {"shared": True, "size": size, "dtype": torch.uint8}
        self._parts = [torch.from_file(str(folder / str(rank)), **shape) for rank in range(dist.get_world_size())]

    def get_buffer(self, rank: int, sizes: list[int], dtype: torch.dtype, storage_offset: int) -> Tensor:
        if dist.get_rank() == 1 and rank != 1:
            time.sleep(0.003)
        assert dtype == torch.uint8
        return self._parts[rank][storage_offset : storage_offset + sizes[0]]

    def barrier(self, channel: int) -> None:
        dist.barrier()


def shared_gather(folder: Path, slot_bytes: int) -> CopyEngineGather:
    copy_engine_gather.SLOT_BYTES = slot_bytes
    return CopyEngineGather(SharedFile(folder, 2 * slot_bytes), dist.get_rank(), None)


def differing(folder: Path) -> list[int]:
    """How many bytes of each gather are others than NCCL's would be, in slots of 16 bytes."""
    gather, (rank, ranks) = shared_gather(folder, 16), (dist.get_rank(), dist.get_world_size())
    generator, found = torch.Generator().manual_seed(0), []
    for size in (16, 5, 100, 0, 33):
        everyones = torch.randint(256, (ranks, size), generator=generator, dtype=torch.uint8)
        output = torch.zeros_like(everyones)
        output[rank] = everyones[rank]
        gather(output, everyones[rank])
        found.append(int((output != everyones).sum()))
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_gets_every_ranks_bytes(world_size: int, tmp_path: Path) -> None:
    assert run_ranks(differing, world_size, tmp_path) == [[0] * 5] * world_size


def damage_by_shared_gather(folder: Path, replicas: int) -> list[int]:
    numbers = itertools.count()

    @cache
    def of_group(group: dist.ProcessGroup, device: torch.device) -> CopyEngineGather:
        place = folder / f"{next(numbers)}-{dist.get_global_rank(group, 0)}"
        place.mkdir(exist_ok=True)
        gather = shared_gather(place, 1 << 12)
        assert group.size() == dist.get_world_size() // replicas
        return gather

    exact_all_gather.copy_engine_gather = of_group
    return damage(modes(512, exact=True, offload=False, replicas=replicas))


def test_fsdp2_brings_every_pattern_through_it(tmp_path: Path) -> None:
    for changed in run_ranks(damage_by_shared_gather, 2, tmp_path, 1):
        assert changed
        assert not any(changed)


def test_a_wrong_choice_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSHARDED_GATHER", "fast")
    with pytest.raises(ValueError, match="QSHARDED_GATHER must be one of auto, nccl, got 'fast'"):
        wanted_gather()


def test_ranks_without_gpus_gather_by_their_process_group() -> None:
    assert run_ranks(gather_of_cpus, 2) == [None, None]


def gather_of_cpus() -> CopyEngineGather | None:
    return copy_engine_gather.copy_engine_gather(dist.group.WORLD, torch.device("cpu"))
