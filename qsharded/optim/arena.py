"""Optimizer state of many parameters in few tensors: where each one's blocks lie, on the device or in host memory.

A parameter takes whole blocks of 256 values, which the positions of its values in the whole parameter decide: a shard
that begins within a block leaves the block's start empty. So the codes of a block do not depend on who holds it.
Parameters of one type follow each other, the device's before the host's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsharded.optim.host_memory import host_bytes, lock
from qsharded.optim.reference import Moments
from qsharded.quant.blockwise8 import BLOCK

BLOCK_BYTES = 2 * (BLOCK + 4)  # codes and fp32 scales of both moments


@dataclass(frozen=True)
class Slot:
    """Where a parameter's values lie: ``count`` of them, ``lead`` values into block ``first_block``."""

    first_block: int
    lead: int
    count: int
    dtype: torch.dtype

    @property
    def blocks(self) -> int:
        return -(-(self.lead + self.count) // BLOCK) if self.count else 0

    @property
    def end(self) -> int:
        return self.first_block + self.blocks

    @property
    def origin(self) -> int:
        """The parameter's first value among all values of the arena's blocks."""
        return self.first_block * BLOCK + self.lead


@dataclass(frozen=True)
class Bucket:
    """Consecutive blocks of one parameter type, updated in one launch."""

    first_block: int
    blocks: int
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.first_block + self.blocks


@dataclass(frozen=True)
class BucketSlice:
    """What a bucket holds of a parameter: ``count`` values from ``first_value`` on, ``lead`` values into its blocks."""

    first_block: int
    blocks: int
    lead: int
    first_value: int
    count: int


@dataclass(frozen=True)
class Blocks:
    """The state of consecutive blocks: codes (uint8) and scales (fp32, one a block), or fp32 moments and no scales."""

    state1: Tensor
    state2: Tensor
    absmax1: Tensor | None
    absmax2: Tensor | None

    @classmethod
    def empty(cls, blocks: int, device: torch.device) -> "Blocks":
        """Codes and scales for so many blocks, zeros: moments of 0."""
        codes = torch.zeros(2 * blocks * BLOCK, dtype=torch.uint8, device=device)
        return cls.within(codes, torch.zeros(2 * blocks, device=device))

    @classmethod
    def within(cls, codes: Tensor, scales: Tensor) -> "Blocks":
        """Codes (uint8) and scales (fp32) of both moments, one moment after the other."""
        return cls(*codes.chunk(2), *scales.chunk(2))

    @classmethod
    def empty_fp32(cls, blocks: int, device: torch.device) -> "Blocks":
        """fp32 moments for so many blocks, zeros."""
        state1, state2 = torch.zeros(2, blocks * BLOCK, device=device)
        return cls(state1, state2, None, None)

    def part(self, first: int, blocks: int) -> "Blocks":
        """Blocks [first, first + blocks) of these."""
        values, scales = slice(first * BLOCK, (first + blocks) * BLOCK), slice(first, first + blocks)
        absmax = [None if scale is None else scale[scales] for scale in (self.absmax1, self.absmax2)]
        return Blocks(self.state1[values], self.state2[values], *absmax)

    def moments(self, lead: int, count: int) -> Moments:
        """What these blocks hold of one parameter."""
        values = slice(lead, lead + count)
        return Moments(self.state1[values], self.state2[values], self.absmax1, self.absmax2, lead)

    def copy_(self, other: "Blocks") -> None:
        """Queue a copy of the state of ``other``."""
        for mine, its in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(its, non_blocking=True)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> list[Tensor]:
        """What this consists of."""
        return [t for t in (self.state1, self.state2, self.absmax1, self.absmax2) if t is not None]


class Arena:
    """The state of some parameters of one optimizer, in 8 bits or in fp32."""

    def __init__(self, slots: Sequence[Slot], on_device: Blocks, on_host: Blocks | None = None) -> None:
        self.slots = slots
        self.resident = on_device.state1.numel() // BLOCK  # this many blocks lie on the device, the others on the host
        self._device, self._host = on_device, on_host

    @classmethod
    def of_8_bits(cls, slots: Sequence[Slot], device: torch.device, resident_bytes: int) -> "Arena":
        """Zeros; the first parameters stay on the device, as many as fit into so many bytes."""
        resident = max((slot.end for slot in slots if slot.end * BLOCK_BYTES <= resident_bytes), default=0)
        paged = _total(slots) - resident
        if not paged:
            return cls(slots, Blocks.empty(resident, device))
        codes, scales = host_bytes(2 * paged * BLOCK), host_bytes(2 * paged * 4).view(torch.float32)
        arena = cls(slots, Blocks.empty(resident, device), Blocks.within(codes, scales))
        if device.type == "cuda":
            lock(codes, device, owner=arena)
            lock(scales, device, owner=arena)
        return arena

    @classmethod
    def of_fp32(cls, slots: Sequence[Slot], device: torch.device) -> "Arena":
        """Zeros, all on the device."""
        return cls(slots, Blocks.empty_fp32(_total(slots), device))

    @property
    def device_bytes(self) -> int:
        return self._device.nbytes

    @property
    def host_bytes(self) -> int:
        return self._host.nbytes if self._host else 0

    def moments(self, slot: Slot) -> Moments:
        """A parameter's state, as views."""
        return self.at(slot.first_block, slot.blocks).moments(slot.lead, slot.count)

    def at(self, first_block: int, blocks: int) -> Blocks:
        """State of consecutive blocks that lie together, as views."""
        if self._host is not None and first_block >= self.resident and blocks:
            return self._host.part(first_block - self.resident, blocks)
        return self._device.part(first_block, blocks)

    def resident_buckets(self) -> list[Bucket]:
        """What needs no paging: a bucket for each type of parameter."""
        return list(self._cut(0, self.resident, self.resident))

    def paged_buckets(self, most_blocks: int) -> list[Bucket]:
        """What is paged, in buckets of at most so many blocks."""
        return list(self._cut(self.resident, _total(self.slots), most_blocks))

    def slices(self, bucket: Bucket) -> Iterator[tuple[int, BucketSlice]]:
        """The parameters of a bucket by number, with what it holds of each."""
        for number, slot in enumerate(self.slots):
            first, end = max(slot.first_block, bucket.first_block), min(slot.end, bucket.end)
            if first < end:
                start, stop = max(first * BLOCK - slot.origin, 0), min(end * BLOCK - slot.origin, slot.count)
                lead = slot.lead if first == slot.first_block else 0
                yield number, BucketSlice(first, end - first, lead, start, stop - start)

    def _cut(self, start: int, stop: int, most: int) -> Iterator[Bucket]:
        for dtype, first, last in _runs(self.slots):
            at, end = max(first, start), min(last, stop)
            while at < end:
                blocks = min(most, end - at)
                yield Bucket(at, blocks, dtype)
                at += blocks


def place(counts: Sequence[tuple[int, int, torch.dtype]]) -> list[Slot]:
    """Slots one after the other for parameters given as (first value, count, dtype)."""
    slots: list[Slot] = []
    for first_value, count, dtype in counts:
        slots.append(Slot(slots[-1].end if slots else 0, first_value % BLOCK, count, dtype))
    return slots


def _total(slots: Sequence[Slot]) -> int:
    return slots[-1].end if slots else 0


def _runs(slots: Sequence[Slot]) -> Iterator[tuple[torch.dtype, int, int]]:
    """Blocks [first, last) of each type of parameter."""
    for dtype in dict.fromkeys(slot.dtype for slot in slots):
        of_type = [slot for slot in slots if slot.dtype == dtype]
        yield dtype, of_type[0].first_block, of_type[-1].end
