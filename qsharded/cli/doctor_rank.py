"""One of the ranks that ``qsharded.doctor`` starts: the gather probe, and how fast shards are gathered."""

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from qsharded.distributed.exact_all_gather import DamagedGather
from qsharded.distributed.self_test import check_gather
from qsharded.distributed.world import World, start_world, stop_world
from qsharded.utils import collectives

_ROUNDS = 5
_BYTES = {"cuda": 1 << 28, "cpu": 1 << 24}  # a layer of a large model; on a CPU less, so that nobody waits


JOINING, PROBE, SPEED = "finding each other", "the gather of packed weights", "the all-gather"


def main() -> None:
    """Print lines of JSON: on the main rank that all have ``joined``, then what the probe found ("" where all is well)
    and bytes a second; on any rank what ``failed``, in which step, and whether that is a matter of the connections."""
    with _failure_told(JOINING):
        world = _shared_gpu() if torch.cuda.device_count() == 1 else start_world()
    if world.is_main:
        print(json.dumps({"joined": True}), flush=True)
    with _failure_told(PROBE):
        damage = _damage(world)
    with _failure_told(SPEED):
        speed = _bandwidth(world)
    if world.is_main:
        print(json.dumps({"damage": damage, "bytes_per_second": speed}), flush=True)
    stop_world(world)


@contextmanager
def _failure_told(step: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        message = f"{type(error).__name__}: {error}".partition("\n")[0]
        print(json.dumps({"failed": message, "step": step, "is_connection": _is_connection(error, step)}), flush=True)
        raise


def _is_connection(error: Exception, step: str) -> bool:
    """NCCL connects in the first collective; and gloo complains so of a rank that has failed by itself."""
    return step == JOINING or isinstance(error, dist.DistError | ConnectionError) or "gloo" in str(error).casefold()


def _shared_gpu() -> World:
    """All ranks on the only GPU, over gloo: the copies that can do damage are the GPU's, whatever the wire."""
    device = torch.device("cuda", 0)
    torch.zeros(1, device=device)  # a device that is in use is not chosen anew by the mesh
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    return World(dist.get_rank(), dist.get_world_size(), device, mesh)


def _damage(world: World) -> str:
    try:
        check_gather(world)
    except DamagedGather as error:
        return str(error)
    return ""


def _bandwidth(world: World) -> float:
    """Bytes a second that a rank receives in an all-gather, as FSDP2's are sent; the median of some."""
    own = torch.zeros(_BYTES[world.device.type] // world.size, dtype=torch.uint8, device=world.device)
    whole = own.new_empty(own.numel() * world.size)
    seconds = []
    for _ in range(_ROUNDS + 1):
        world.barrier()
        _wait(world.device)
        start = time.perf_counter()
        if world.group is not None:
            collectives.all_gather_into(whole, own, world.group)
        _wait(world.device)
        seconds.append(time.perf_counter() - start)
    return own.nbytes * (world.size - 1) / statistics.median(seconds[1:])  # the first builds connections


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
