"""Host-resident state streams through buckets on the device: copy in, step, copy out, several at a time.

Nothing waits for the device: copies run on two streams of their own and wait for each other by events. On a CPU the
same steps run one after the other.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch

from qsharded.optim.arena import BLOCK_BYTES, Arena, Blocks, Bucket

PageBudget = Literal["auto", "max", "none"] | int
BUCKET_BYTES = 32 * 2**20  # 0.6 ms of PCIe 5: a copy's start costs nothing beside it
# "max" keeps so much of the state on its way. What has arrived before the last gradient costs no time, so this is most
# of an 8B model's adapter (r = 64), and no more of anything larger.
IN_FLIGHT_BYTES = 256 * 2**20
_RESERVED = 0.05  # part of the device's memory that "auto" leaves to others


def check_page_budget(budget: PageBudget) -> None:
    """Raises ValueError for what is no page budget."""
    if budget not in ("auto", "max", "none") and not (type(budget) is int and budget >= 0):
        raise ValueError(f"page_budget must be 'auto', 'max', 'none' or a number of bytes, got {budget!r}")


def resident_bytes(budget: PageBudget, device: torch.device, freed_bytes: int = 0) -> int:
    """How much state may stay on ``device``.

    "auto" counts memory that nobody holds. PyTorch's cache is held: after a backward pass it is what training needs at
    its peak, but for ``freed_bytes``, which earlier state has left there.
    """
    if isinstance(budget, int):
        return budget
    if budget == "max":
        return 0
    if budget == "none" or device.type != "cuda":
        return 2**63
    free, total = torch.cuda.mem_get_info(device)
    return max(0, int(free + freed_bytes - _RESERVED * total))


class Pager:
    """Streams the host's part of an arena through two buckets on the device, and more of them with "max"."""

    def __init__(self, arena: Arena, budget: PageBudget, bucket_bytes: int, device: torch.device) -> None:
        most_blocks = max(bucket_bytes // BLOCK_BYTES, 1)
        self._arena, self._buckets = arena, arena.paged_buckets(most_blocks)
        stages = 2 + (IN_FLIGHT_BYTES // bucket_bytes if budget == "max" else 0)
        largest = max((bucket.blocks for bucket in self._buckets), default=0)
        self._lanes = _CudaLanes(device) if device.type == "cuda" else _CpuLanes()
        self._stages = [Stage(largest, device, self._lanes) for _ in self._buckets[:stages]]
        self._fetched = 0  # buckets on the device or on their way to it

    @property
    def device_bytes(self) -> int:
        """Device memory that the buckets take."""
        return sum(stage.blocks.nbytes for stage in self._stages)

    def prefetch(self) -> None:
        """Start to copy as many buckets as there is room for."""
        while self._fetched < len(self._stages):
            self._fetch()

    def stream(self) -> Iterator[tuple[Bucket, Blocks]]:
        """Each bucket with its state on the device, for the current stream to change until the next is asked for."""
        self.prefetch()
        for number, bucket in enumerate(self._buckets):
            stage = self._stages[number % len(self._stages)]
            staged = stage.blocks.part(0, bucket.blocks)
            self._lanes.wait_for_copy_in(stage)
            yield bucket, staged
            with self._lanes.copy_out(stage):
                self._on_host(bucket).copy_(staged)
            if self._fetched < len(self._buckets):
                self._fetch()
        self._fetched = 0

    def synchronize(self) -> None:
        """Wait until the host's state is up to date."""
        self._lanes.synchronize()

    def _fetch(self) -> None:
        bucket, stage = self._buckets[self._fetched], self._stages[self._fetched % len(self._stages)]
        with self._lanes.copy_in(stage):
            stage.blocks.part(0, bucket.blocks).copy_(self._on_host(bucket))
        self._fetched += 1

    def _on_host(self, bucket: Bucket) -> Blocks:
        return self._arena.at(bucket.first_block, bucket.blocks)


class Stage:
    """Room for one bucket on the device."""

    def __init__(self, most_blocks: int, device: torch.device, lanes: "_CudaLanes | _CpuLanes") -> None:
        self.blocks = Blocks.empty(most_blocks, device)
        self.filled, self.drained = lanes.adopt(self.blocks)  # events, of copies in and out


class _CudaLanes:
    """A stream for each direction, so that both use the bus at a time."""

    def __init__(self, device: torch.device) -> None:
        self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def adopt(self, blocks: Blocks) -> tuple[Any, Any]:
        """Events for a stage whose memory the current stream has just filled with zeros."""
        self._in.wait_stream(torch.cuda.current_stream(self._in.device))
        for stream in (self._in, self._out):
            for tensor in blocks.tensors():
                tensor.record_stream(stream)  # its memory goes to nobody else while a copy is under way
        return torch.cuda.Event(), torch.cuda.Event()

    @contextmanager
    def copy_in(self, stage: Stage) -> Iterator[None]:
        self._in.wait_event(stage.drained)
        with torch.cuda.stream(self._in):
            yield
        stage.filled.record(self._in)

    def wait_for_copy_in(self, stage: Stage) -> None:
        torch.cuda.current_stream(self._in.device).wait_event(stage.filled)

    @contextmanager
    def copy_out(self, stage: Stage) -> Iterator[None]:
        self._out.wait_stream(torch.cuda.current_stream(self._out.device))
        with torch.cuda.stream(self._out):
            yield
        stage.drained.record(self._out)

    def synchronize(self) -> None:
        self._out.synchronize()


class _CpuLanes:
    """Every copy is done when it returns."""

    def adopt(self, blocks: Blocks) -> tuple[Any, Any]:
        return None, None

    def copy_in(self, stage: Stage) -> AbstractContextManager[None]:
        return nullcontext()

    copy_out = copy_in

    def wait_for_copy_in(self, stage: Stage) -> None:
        pass

    def synchronize(self) -> None:
        pass
