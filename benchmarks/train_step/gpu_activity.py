"""What a GPU did in a step: how long it was busy, with how many kernels, and in which phase."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch

# The first that stands in a kernel's name decides.
_PHASES = (
    ("nccl", "communication"),
    ("dequantize", "dequantize"),
    ("flash", "attention"),
    ("cudnn", "attention"),
    ("adamw", "optimizer"),
    ("multi_tensor", "optimizer"),
    ("nvjet", "products"),
    ("gemm", "products"),
    ("cutlass", "products"),
    ("splitK", "products"),
)
_ELEMENT_WISE = "element-wise and loss"


def profiled(step: Callable[[], Any]) -> dict[str, Any]:
    """Kernels, milliseconds in which at least one ran, and milliseconds by phase, of one call of ``step``."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    kernels = [
        event
        for event in profile.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    phases: Counter[str] = Counter()
    for event in kernels:
        phases[phase_of(event.name)] += event.time_range.elapsed_us()
    return {
        "kernels": len(kernels),
        "busy_ms": union((event.time_range.start, event.time_range.end) for event in kernels) / 1e3,
        "phases_ms": {phase: round(us / 1e3, 2) for phase, us in phases.most_common()},
    }


def phase_of(kernel: str) -> str:
    """The phase that a kernel of that name belongs to."""
    return next((phase for word, phase in _PHASES if word.lower() in kernel.lower()), _ELEMENT_WISE)


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """How long at least one of the intervals lasted."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered
