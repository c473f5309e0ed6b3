"""One rank of ``benchmarks.loading``: times a phase, and for loading looks at the most memory it took."""

import json
import math
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qsharded.checkpoint import fill_shards, load_model
from qsharded.checkpoint.load import expected_shapes, quantizing_fills, skeleton
from qsharded.checkpoint.row_chunks import RowChunk
from qsharded.checkpoint.source import SafetensorsFolder
from qsharded.cli.command import join_world
from qsharded.distributed.agreement import groups_of
from qsharded.distributed.placement import parallelize
from qsharded.distributed.world import World, stop_world
from qsharded.models import CausalLM
from qsharded.models.choice import read_config
from qsharded.quant.pack_weight import double_quantize
from qsharded.utils.sharding import RowRange, local
from qsharded.utils.untrusted_json import read_json

GIB = 2**30
CPU = torch.device("cpu")


class Resident(SafetensorsFolder):
    """Gives for every chunk the same bytes, which are on the device already."""

    def stream(self, chunks: Sequence[RowChunk], device: torch.device) -> Generator[Tensor, None, None]:
        generator = torch.Generator().manual_seed(0)
        words = -(-max((chunk.nbytes for chunk in chunks), default=0) // 2)
        values = (torch.randn(words, generator=generator) * 0.02).bfloat16().to(device).view(torch.uint8)
        yield values[:0]  # made before the clock starts
        for chunk in chunks:
            yield values[: chunk.nbytes]


def main() -> None:
    phase, folder, results, model_code = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    world = join_world("benchmarks.loading")
    warm_up(world)
    measured = {"read": measure_read, "quantize": measure_quantize, "load": measure_load}[phase](
        folder, world, model_code
    )
    Path(results, f"{world.rank}.json").write_text(json.dumps(measured))
    stop_world(world)


def warm_up(world: World) -> None:
    """Contexts, compiled kernels and communicators, which a run needs once whatever it loads."""
    absmax_NG = torch.rand(8, 4, device=world.device)
    group = world.mesh.get_group() if world.mesh else None
    double_quantize(absmax_NG, fill_shards.shared(RowRange(0, 8, 8, group)))
    torch.ops.qsharded.nf4_quantize(torch.randn(8, 256, device=world.device).bfloat16())


def seconds(work: Callable[[], object], world: World) -> float:
    """Wall clock of ``work`` from when all ranks stand ready."""
    if world.mesh is not None:
        dist.barrier()
    synchronize(world)
    start = time.perf_counter()
    work()
    synchronize(world)
    return time.perf_counter() - start


def synchronize(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def empty_model(folder: Path, world: World, model_code: Any) -> CausalLM:
    """As ``load_model`` makes it before it reads."""
    model = skeleton(read_config(read_json(folder / "config.json"), model_code), None, torch.bfloat16)
    parallelize(model, world.mesh, world.device, param_dtype=torch.bfloat16)
    return model


def chunks(folder: Path, world: World, model_code: Any) -> list[RowChunk]:
    """All that this rank reads."""
    fills = quantizing_fills(empty_model(folder, world, model_code), SafetensorsFolder(folder))
    return [chunk for fill in fills for chunk in fill.chunks]


def measure_read(folder: Path, world: World, model_code: Any) -> dict[str, Any]:
    source, wanted = SafetensorsFolder(folder), chunks(folder, world, model_code)

    def read() -> None:
        for _ in source.stream(wanted, CPU):
            pass

    read()  # into the page cache
    return {"seconds": seconds(read, world), "bytes": sum(chunk.nbytes for chunk in wanted)}


def measure_quantize(folder: Path, world: World, model_code: Any) -> dict[str, Any]:
    source = Resident(folder)
    fills = quantizing_fills(empty_model(folder, world, model_code), source)
    stream = source.stream([chunk for fill in fills for chunk in fill.chunks], world.device)
    next(stream)
    groups = groups_of(world.mesh)
    return {"seconds": seconds(lambda: fill_shards.take_all(fills, source, stream, world.device, groups), world)}


def measure_load(folder: Path, world: World, model_code: Any) -> dict[str, Any]:
    before = Memory(world)
    loaded: list[CausalLM] = []

    def load() -> None:
        settings = {"dtype": torch.bfloat16, "device": world.device, "model_code": model_code}
        loaded.append(load_model(folder, mesh=world.mesh, **settings))

    took = seconds(load, world)
    shard = sum(local(t).nbytes for t in [*loaded[0].parameters(), *loaded[0].buffers()])
    largest = max(2 * math.prod(shape) for shape in expected_shapes(loaded[0]).values())
    on_host = 0 if world.device.type == "cuda" else shard  # there the model is no scratch
    return {
        "seconds": took,
        "host_gib": (before.host_peak() - on_host) / GIB,
        "device_gib": before.device_peak() / GIB,
        "shard_gib": shard / GIB,
        "largest_tensor_gib": largest / GIB,
    }


class Memory:
    """The most that is taken on top of what is held when it is made. Linux alone counts resident memory so."""

    def __init__(self, world: World) -> None:
        self._device = world.device
        with suppress(OSError):  # a container may forbid it; the peak then counts from the process's start
            Path("/proc/self/clear_refs").write_text("5")
        self._host = status("VmRSS")
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._on_device = torch.cuda.memory_allocated(self._device)

    def host_peak(self) -> int:
        """In bytes, of resident memory; pinned memory among it."""
        return status("VmHWM") - self._host

    def device_peak(self) -> int:
        """In bytes, as PyTorch's allocator counts; 0 on the CPU."""
        if self._device.type != "cuda":
            return 0
        return torch.cuda.max_memory_allocated(self._device) - self._on_device


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))


if __name__ == "__main__":
    main()
