"""Copies of a rank's tensors in host memory, made without waiting for the GPU."""

from collections.abc import Mapping

import torch
from torch import Tensor


class HostCopies:
    """Host memory for copies of named tensors. It is kept from one time to the next, pinned where a GPU fills it."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def copy(self, home: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of ``tensors``, which overwrite the last ones under the same ``home`` and names.

        Those from a GPU hold their values when its stream has come this far: wait for :func:`mark_stream`.
        """
        return {
            name: self._buffer(home, name, source).copy_(source, non_blocking=True) for name, source in tensors.items()
        }

    def _buffer(self, home: str, name: str, source: Tensor) -> Tensor:
        buffer = self._buffers.get((home, name))
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self._buffers[home, name] = buffer
        return buffer


def mark_stream(device: torch.device) -> torch.cuda.Event | None:
    """A mark behind all that the device was given to do so far; its ``synchronize`` waits for that."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
