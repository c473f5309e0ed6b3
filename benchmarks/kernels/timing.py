"""Times of several functions, taken in turns, each from a cache that holds none of their data."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

# Read before each call: several times any cache, and long enough that the GPU is still busy with it when the call's
# launches arrive, so that the host's own time does not count. Reading leaves nothing to be written back, which would
# be charged to the call.
_FLUSHED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
_WARM_UP_CALLS = 3


@dataclass(frozen=True)
class Times:
    """Microseconds."""

    median: float
    p20: float
    p80: float


def in_turns(functions: Mapping[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, Times]:
    """``repeats`` calls of each function; one after another and over again, so that a drift of the clocks hits all."""
    clock = _gpu_clock if device.type == "cuda" else _cpu_clock
    flushed = torch.ones(_FLUSHED_BYTES[device.type] // 4, device=device)
    for function in functions.values():
        for _ in range(_WARM_UP_CALLS):
            function()
    readings: dict[str, list[Callable[[], float]]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            flushed.sum()
            readings[name].append(clock(function))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {name: summary([read() for read in reads]) for name, reads in readings.items()}


def summary(microseconds: list[float]) -> Times:
    if len(microseconds) == 1:
        return Times(*microseconds * 3)
    fifths = statistics.quantiles(microseconds, n=5, method="inclusive")
    return Times(statistics.median(microseconds), fifths[0], fifths[-1])


def _gpu_clock(function: Callable[[], object]) -> Callable[[], float]:
    """The reading is made later, for asking now would wait for the GPU."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    return lambda: start.elapsed_time(end) * 1e3


def _cpu_clock(function: Callable[[], object]) -> Callable[[], float]:
    start = time.perf_counter()
    function()
    microseconds = (time.perf_counter() - start) * 1e6
    return lambda: microseconds
