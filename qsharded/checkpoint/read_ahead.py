"""Reading ahead: bytes are read into a few buffers by threads while those read before are worked on."""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

PIECE = 64 << 20
"""Bytes that are read at once: large enough for any disk and for the copy to a GPU."""

# Two threads read from the page cache faster than one, four buffers keep both busy: 256 MiB of host memory a rank.
_THREADS, _BUFFERS = 2, 4
HOST_BYTES = _BUFFERS * PIECE


def read_ahead(
    fills: Sequence[Callable[[Tensor], None]], sizes: Sequence[int], device: torch.device
) -> Generator[Tensor, None, None]:
    """What each of ``fills`` puts into the buffer that it is given, uint8 of its size, on ``device`` and in order.

    A tensor is good until the next one is asked for. At most four are read and not yet taken.

    Raises:
        whatever a fill raised, in its turn.
    """
    size = max(sizes, default=0)
    buffers = [_Buffer(size, device) for _ in range(min(_BUFFERS, len(fills)))]
    with ThreadPoolExecutor(_THREADS) as threads:

        def start(number: int) -> Future[Tensor]:
            return threads.submit(buffers[number % _BUFFERS].fill, fills[number], sizes[number])

        waiting = deque(start(number) for number in range(len(buffers)))
        for number in range(len(fills)):
            yield buffers[number % _BUFFERS].on_device(waiting.popleft().result())
            if number + _BUFFERS < len(fills):
                waiting.append(start(number + _BUFFERS))


class _Buffer:
    """Host memory that is filled again and again; for a GPU it is pinned, so that copies run beside the work."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._device = device
        self._copied: torch.cuda.Event | None = None
        self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def fill(self, fill: Callable[[Tensor], None], size: int) -> Tensor:
        """In a reading thread: the first ``size`` bytes, filled once the last copy out of them is done."""
        if self._copied is not None:
            self._copied.synchronize()
        fill(self._memory[:size])
        return self._memory[:size]

    def on_device(self, raw: Tensor) -> Tensor:
        """In the working thread: the bytes where the work is done."""
        if self._device.type == "cpu":
            return raw
        moved = raw.to(self._device, non_blocking=True)
        if self._device.type == "cuda":
            self._copied = torch.cuda.current_stream(self._device).record_event()
        return moved
