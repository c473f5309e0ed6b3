"""The state of one optimizer's parameters on one device, and an AdamW step over it, bucket by bucket."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from qsharded.optim import reference
from qsharded.optim.arena import Arena, Blocks, Bucket, place
from qsharded.optim.kernels import optimizer_kernels, step_tables
from qsharded.optim.local_values import first_value, holds_rows
from qsharded.optim.paging import PageBudget, Pager, resident_bytes
from qsharded.utils.sharding import local

MIN_8BIT_SIZE = 4096  # smaller parameters keep fp32 moments, as bitsandbytes' do
DTYPES = (torch.float32, torch.bfloat16)


class Store:
    """State for ``parameters``, zeros at first. ``freed_bytes``: what an earlier store has left in PyTorch's cache.

    Raises:
        ValueError: parameters on several devices, not contiguous, or neither fp32 nor bf16.
    """

    def __init__(
        self, parameters: Sequence[Tensor], page_budget: PageBudget, bucket_bytes: int, *, freed_bytes: int = 0
    ) -> None:
        _check(parameters)
        self.device = local(parameters[0]).device
        large = [p for p in parameters if p.numel() >= MIN_8BIT_SIZE]
        small = [p for p in parameters if p.numel() < MIN_8BIT_SIZE]
        # by type, for a launch serves one
        self.parameters = [p for kind in (large, small) for dtype in DTYPES for p in kind if p.dtype == dtype]
        self.row = {parameter: row for row, parameter in enumerate(self.parameters)}
        self._kinds = [_kind(parameter) for parameter in self.parameters]
        self._sharded = any(isinstance(parameter, DTensor) for parameter in parameters)
        self.steps = torch.zeros(len(parameters), device=self.device)
        slots = place([_describe(p) for p in self.parameters[: len(large)]])
        arena = Arena.of_8_bits(slots, self.device, resident_bytes(page_budget, self.device, freed_bytes))
        self._large = _Section(arena, 0, self.device)
        small_slots = place([_describe(p) for p in self.parameters[len(large) :]])
        self._small = _Section(Arena.of_fp32(small_slots, self.device), len(large), self.device)
        self._pager = Pager(arena, page_budget, bucket_bytes, self.device)
        self._table, self._parameter_addresses, self._gradient_addresses = torch.empty(0), [0], [0]

    @property
    def device_bytes(self) -> int:
        """Device memory for codes and scales, the pager's buckets included."""
        return self._large.arena.device_bytes + self._pager.device_bytes

    @property
    def host_bytes(self) -> int:
        """Host memory for codes and scales that are paged."""
        return self._large.arena.host_bytes

    def fits(self) -> bool:
        """Whether all parameters are what they were when this was made: not moved, not cast."""
        return self._kinds == [_kind(parameter) for parameter in self.parameters]

    def prefetch(self) -> None:
        """Start to copy paged state to the device, as far as there is room."""
        self._pager.prefetch()

    def synchronize(self) -> None:
        """Wait until state in host memory is up to date."""
        self._pager.synchronize()

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """What stands in ``optimizer.state``: views, in the shape of the local shard. ``first_value`` and ``values``
        say which of the parameter's values these are."""
        row = self.row[parameter]
        section = self._large if row < self._small.first_row else self._small
        moments = section.arena.moments(section.arena.slots[row - section.first_row])
        shape = local(parameter).shape
        state = {
            "step": self.steps[row],
            "state1": moments.state1.view(shape),
            "state2": moments.state2.view(shape),
            "first_value": first_value(parameter),
            "values": parameter.numel() if holds_rows(parameter) else shape.numel(),
        }
        if moments.absmax1 is not None:
            state |= {"absmax1": moments.absmax1, "absmax2": moments.absmax2}
        return state

    def load(self, parameter: Tensor, state: Mapping[str, Any]) -> None:
        """Take over ``state``, as :meth:`state_of` gives it.

        Raises:
            ValueError: 8-bit state for fp32 moments, or the reverse.
        """
        mine = self.state_of(parameter)
        if mine.keys() - state.keys():
            raise ValueError(f"state of {tuple(parameter.shape)} parameters has {list(mine)}, got {list(state)}")
        for key, value in mine.items():
            if isinstance(value, Tensor):
                value.copy_(state[key])

    def gradients(self) -> list[Tensor | None]:
        """Of the local shards, in the order of ``parameters``, contiguous; None where there is none.

        Raises:
            ValueError: a gradient that is sparse, or of another type or sharding than its parameter.
        """
        found = [parameter.grad for parameter in self.parameters]
        if self._sharded:
            found = [_local_gradient(parameter) for parameter in self.parameters]
        return [
            gradient if gradient is None or _fits(gradient, parameter) else gradient.contiguous()
            for gradient, parameter in zip(found, self.parameters, strict=True)
        ]

    def update(self, gradients: Sequence[Tensor | None], coefficients: Tensor, skip: Tensor) -> None:
        """One step of every parameter that has a gradient, in a launch a bucket.

        Args:
            gradients: as :meth:`gradients` gives them.
            coefficients: fp32 [parameters, 9], see ``reference``.
            skip: fp32 [], not 0 to leave everything as it is.
        """
        kernels = optimizer_kernels(self.device)
        if kernels is None:
            if not skip:
                self._update_by_reference(gradients, coefficients)
            return
        table, tables = self._current_table(gradients), step_tables(self.device)
        for section, bucket, blocks in self._buckets():
            kernels.update(
                *(blocks.state1, blocks.state2, blocks.absmax1, blocks.absmax2, bucket.first_block),
                section.row_of_block[bucket.first_block : bucket.end],
                *(table, coefficients, skip, tables, bucket.dtype),
            )

    def _update_by_reference(self, gradients: Sequence[Tensor | None], coefficients: Tensor) -> None:
        for section, bucket, blocks in self._buckets():
            for number, part in section.arena.slices(bucket):
                row = section.first_row + number
                gradient, values = gradients[row], slice(part.first_value, part.first_value + part.count)
                if gradient is None:
                    continue
                moments = blocks.part(part.first_block - bucket.first_block, part.blocks).moments(part.lead, part.count)
                parameter = local(self.parameters[row]).view(-1)
                reference.adamw_(parameter[values], gradient.view(-1)[values], moments, coefficients[row])

    def _buckets(self) -> Iterator[tuple["_Section", Bucket, Blocks]]:
        """All buckets with their state on the device, for the current stream to change."""
        for section in (self._large, self._small):
            for bucket in section.arena.resident_buckets():
                yield section, bucket, section.arena.at(bucket.first_block, bucket.blocks)
        for bucket, blocks in self._pager.stream():
            yield self._large, bucket, blocks

    def _current_table(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """int64 [parameters, 4], as the kernels take it. Addresses may change from step to step, the rest does not."""
        parameters = [held.data_ptr() for held in map(local, self.parameters)]
        addresses = [0 if gradient is None else gradient.data_ptr() for gradient in gradients]
        if parameters != self._parameter_addresses:
            slots = [*self._large.arena.slots, *self._small.arena.slots]
            rows = [(address, 0, slot.count, slot.origin) for address, slot in zip(parameters, slots, strict=True)]
            self._table = upload(rows, torch.int64, self.device)
            self._parameter_addresses, self._gradient_addresses = parameters, [0]
        if addresses != self._gradient_addresses:
            self._table[:, 1] = upload(addresses, torch.int64, self.device)
            self._gradient_addresses = addresses
        return self._table


class _Section:
    """An arena whose parameters are rows from ``first_row`` on."""

    def __init__(self, arena: Arena, first_row: int, device: torch.device) -> None:
        self.arena, self.first_row = arena, first_row
        rows = torch.arange(first_row, first_row + len(arena.slots), dtype=torch.int32)
        blocks = torch.tensor([slot.blocks for slot in arena.slots], dtype=torch.int64)
        self.row_of_block = rows.repeat_interleave(blocks).to(device)


def upload(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of ``values`` on ``device``, which nothing waits for."""
    pinned = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


def _describe(parameter: Tensor) -> tuple[int, int, torch.dtype]:
    return first_value(parameter), local(parameter).numel(), parameter.dtype


def _kind(parameter: Tensor) -> tuple[torch.device, torch.dtype, int]:
    return parameter.device, parameter.dtype, parameter.numel()


def _local_gradient(parameter: Tensor) -> Tensor | None:
    if parameter.grad is None:
        return None
    gradient = local(parameter.grad)
    if gradient.shape != local(parameter).shape:
        raise ValueError(f"a gradient must be sharded as its parameter, got {parameter.grad} for {parameter}")
    return gradient


def _fits(gradient: Tensor, parameter: Tensor) -> bool:
    """Whether a gradient can be read as it lies."""
    if gradient.dtype != parameter.dtype or gradient.layout != torch.strided:
        raise ValueError(
            f"a gradient must be dense and of its parameter's type, got {gradient.layout} {gradient.dtype} for "
            f"{parameter.dtype}"
        )
    return gradient.is_contiguous()


def _check(parameters: Sequence[Tensor]) -> None:
    for parameter in parameters:
        held, first = local(parameter), local(parameters[0])
        if held.device != first.device:
            raise ValueError(f"one optimizer serves one device, got parameters on {first.device} and {held.device}")
        if held.dtype not in DTYPES or held.layout != torch.strided:
            raise ValueError(f"parameters must be dense float32 or bfloat16, got {held.layout} {held.dtype}")
        if not held.is_contiguous():
            raise ValueError(f"parameters must be contiguous, got one with strides {held.stride()} for {held.shape}")
