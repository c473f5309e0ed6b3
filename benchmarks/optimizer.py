"""An optimizer step of PagedAdamW8bit against bitsandbytes', the time to move its bytes, and that of its paging.

    python -m benchmarks.optimizer [--layers 32] [--dtype float32] [--record FILE]

The parameters are the adapters of Llama-3-8B on all linear layers, r = 64: 168 million in 32 layers. A step's time is
the GPU's, with work queued before it as in training, so that launching costs nothing where nothing waits. The record
says of each target whether it is met; the exit status is 1 where one is not.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.record import environment, write
from qsharded.optim import PagedAdamW8bit
from qsharded.optim.paging import BUCKET_BYTES, IN_FLIGHT_BYTES, PageBudget

HIDDEN, KEYS, FEED_FORWARD, RANK = 4096, 1024, 14336, 64
# (in, out) of the linear layers of a decoder layer
LAYERS = [
    *[(HIDDEN, HIDDEN)] * 2,
    *[(HIDDEN, KEYS)] * 2,
    *[(HIDDEN, FEED_FORWARD)] * 2,
    (FEED_FORWARD, HIDDEN),
]
REPEATS = 20
MATMULS_IN_A_STEP = 64  # of 8192^3: 0.1 s on an H200; a QLoRA step of 8B takes longer, which hides more
GIB = 2**30


def adapters(layers: int, dtype: torch.dtype) -> list[nn.Parameter]:
    """A and B of each layer, with gradients."""
    shapes = [shape for i, o in LAYERS for shape in ((RANK, i), (o, RANK))] * layers
    held = [nn.Parameter(torch.randn(shape, device="cuda", dtype=dtype) * 0.02) for shape in shapes]
    for parameter in held:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return held


class Work:
    """Matmuls, for the GPU to be busy with."""

    def __init__(self) -> None:
        self._a, self._b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        self._out = torch.empty_like(self._a)

    def __call__(self, matmuls: int) -> None:
        for _ in range(matmuls):
            torch.matmul(self._a, self._b, out=self._out)


def gpu_ms(function: Callable[[], object], work: Work) -> dict[str, float]:
    """Milliseconds from the end of queued work to the end of ``function`` on the current stream."""
    times = []
    for index in range(REPEATS + 3):
        torch.cuda.synchronize()
        work(8)  # 13 ms: the host is done with its launches by then
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        if index >= 3:
            times.append(start.elapsed_time(end))
    return spread(times)


def wall_ms(function: Callable[[], object], calls: int) -> float:
    """Milliseconds a call of several in a row, with all copies done in the end."""
    function()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls * 1e3


def spread(times: list[float]) -> dict[str, float]:
    return {"median": statistics.median(times), "least": min(times), "most": max(times)}


def copy_of_bytes(count: int) -> Callable[[], object]:
    """Moves so many bytes through the GPU's memory: half are read, half are written."""
    source = torch.ones(count // 8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def step_bytes(held: list[nn.Parameter]) -> int:
    """What a step has to read and write: parameter, codes and scales twice, the gradient once."""
    return sum(
        parameter.numel() * (3 * parameter.element_size() + 4) + parameter.numel() // 256 * 16 for parameter in held
    )


def bus_ms(state_bytes: int) -> dict[str, float]:
    """The time to copy the state to the GPU, back, one after the other, and both at a time."""
    on_host = [torch.ones(state_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    on_device = [torch.ones(state_bytes, dtype=torch.uint8, device="cuda") for _ in range(2)]
    other = torch.cuda.Stream()

    def there() -> None:
        on_device[0].copy_(on_host[0], non_blocking=True)

    def back() -> None:
        on_host[1].copy_(on_device[1], non_blocking=True)

    def both() -> None:
        there()
        with torch.cuda.stream(other):
            back()

    times = {name: wall_ms(copy, 10) for name, copy in (("there", there), ("back", back), ("at_a_time", both))}
    return times | {"one_after_the_other": times["there"] + times["back"]}


def bitsandbytes_ms(held: list[nn.Parameter], work: Work) -> dict[str, Any]:
    """Steps of its paged and its plain optimizer."""
    try:
        from bitsandbytes.optim import AdamW8bit
        from bitsandbytes.optim import PagedAdamW8bit as Theirs
    except ImportError:
        return {}
    times = {}
    for kind in (Theirs, AdamW8bit):
        optimizer = kind(held, lr=1e-5)
        times[kind.__name__] = gpu_ms(optimizer.step, work)
        del optimizer
        free()
    return times


def ours(held: list[nn.Parameter], budget: PageBudget, **options: Any) -> tuple[PagedAdamW8bit, Callable[[], object]]:
    """An optimizer and its step as the trainer takes it, with the gradient's norm known."""
    optimizer, scale = PagedAdamW8bit(held, lr=1e-5, page_budget=budget, **options), torch.ones((), device="cuda")
    return optimizer, lambda: optimizer.step(grad_scale=scale)


def resident(held: list[nn.Parameter], work: Work) -> dict[str, Any]:
    """All state on the GPU."""
    optimizer, step = ours(held, "none")

    def together() -> None:
        work(MATMULS_IN_A_STEP)
        step()

    result: dict[str, Any] = {"step": gpu_ms(step, work), "step_that_looks_for_nan": gpu_ms(optimizer.step, work)}
    result["host_and_gpu"] = wall_ms(step, REPEATS)
    result["within_training"] = wall_ms(together, 5)
    return result


def paged(held: list[nn.Parameter], work: Work, bucket_bytes: int, budget: PageBudget) -> dict[str, Any]:
    """All state in host memory."""
    before = torch.cuda.memory_allocated()
    optimizer, step = ours(held, budget, bucket_bytes=bucket_bytes)
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()

    def train() -> None:
        optimizer.prefetch()
        work(MATMULS_IN_A_STEP)
        step()

    result = {"alone": wall_ms(step, 10), "within_training": wall_ms(train, 5)}
    store = optimizer._store
    assert store is not None
    allowed = (IN_FLIGHT_BYTES if budget == "max" else 0) + 2 * bucket_bytes
    assert store.device_bytes <= allowed, (store.device_bytes, allowed)
    return result | {
        "bucket_bytes": bucket_bytes,
        "budget": budget,
        "state_bytes": store.host_bytes,
        "device_bytes": store.device_bytes,
        "device_bytes_allowed": allowed,
        "device_bytes_measured": torch.cuda.max_memory_allocated() - before,
    }


def free() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def measure(layers: int, dtype: torch.dtype) -> dict[str, Any]:
    """All figures, in milliseconds and bytes."""
    held, work = adapters(layers, dtype), Work()
    work(8)
    result: dict[str, Any] = {"parameters": sum(p.numel() for p in held), "bytes_of_a_step": step_bytes(held)}
    result["bitsandbytes"] = bitsandbytes_ms(held, work)
    result["moving_the_bytes"] = gpu_ms(copy_of_bytes(result["bytes_of_a_step"]), work)
    free()
    result["resident"] = resident(held, work)
    free()
    result["training_alone"] = wall_ms(lambda: work(MATMULS_IN_A_STEP), 5)
    result["paged"] = []
    budgets: tuple[tuple[int, PageBudget], ...] = ((BUCKET_BYTES, "max"), (BUCKET_BYTES, 0), (2 * BUCKET_BYTES, 0))
    for bucket_bytes, budget in budgets:
        result["paged"].append(paged(held, work, bucket_bytes, budget))
        free()
    result["bus"] = bus_ms(result["paged"][0]["state_bytes"])
    return result | {"targets": targets(result)}


def targets(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The ratios that count, each with what it may be."""
    step, fully, both_ways = (
        result["resident"]["step"]["median"],
        result["paged"][0],
        result["bus"]["one_after_the_other"],
    )
    cost = fully["alone"] - result["resident"]["host_and_gpu"]
    seen = fully["within_training"] - result["resident"]["within_training"]
    found = {
        "step_to_moving_its_bytes": (step / result["moving_the_bytes"]["median"], "at most", 1.5),
        "paged_step_to_copying_both_ways": (fully["alone"] / both_ways, "at most", 1.3),
        "hidden_of_paging": (1 - seen / cost, "at least", 0.8),
    }
    if result["bitsandbytes"]:
        theirs = result["bitsandbytes"]["PagedAdamW8bit"]["median"]
        found["step_to_bitsandbytes"] = (step / theirs, "at most", 0.5)
    return {
        name: {"ratio": ratio, bound: limit, "met": ratio <= limit if bound == "at most" else ratio >= limit}
        for name, (ratio, bound, limit) in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="decoder layers")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the parameters")
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this measures a GPU, and there is none")
    torch.manual_seed(0)
    record = environment() | {
        "command": " ".join(["python -m benchmarks.optimizer", *sys.argv[1:]]),
        "dtype": arguments.dtype,
        **measure(arguments.layers, getattr(torch, arguments.dtype)),
    }
    print(json.dumps(record, indent=2))
    if arguments.record:
        write(arguments.record, record)
    sys.exit(not all(target["met"] for target in record["targets"].values()))


if __name__ == "__main__":
    main()
