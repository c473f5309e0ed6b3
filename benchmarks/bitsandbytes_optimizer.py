"""bitsandbytes' 8-bit AdamW step on its own kernel and on ours: the operation for one tensor, and whole optimizers.

    python -m benchmarks.bitsandbytes_optimizer [--dtype float32] [--layers 32] [--record FILE]

`gpu`: the GPU's time, with work queued before it, so that launching costs nothing. `waited_for`: until the host has
seen the step's end, for which bitsandbytes' optimizers wait after each tensor. `limit`: the GPU's time to move the same
bytes. Whole optimizers step the adapters of benchmarks.optimizer.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn

from benchmarks.optimizer import Work, adapters, copy_of_bytes, free, gpu_ms, spread, step_bytes
from benchmarks.record import command, environment, write
from qsharded.integrations import bitsandbytes_optimizer
from qsharded.integrations.bitsandbytes import install, uninstall
from qsharded.optim.kernels import optimizer_kernels
from qsharded_kernels import cuda_adamw8bit

SHAPES = [(4096, 64), (14336, 64), (28672, 64), (1024, 4096), (4096, 4096), (4096, 14336)]
WAITS = 200
OPTIMIZERS = ("AdamW8bit", "PagedAdamW8bit")


def waited_ms(function: Callable[[], object]) -> dict[str, float]:
    """Milliseconds from the call to the end of what it queued."""
    times = []
    for index in range(WAITS + 10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        if index >= 10:
            times.append((time.perf_counter() - start) * 1e3)
    return spread(times)


def operation(shape: tuple[int, int], dtype: torch.dtype) -> tuple[nn.Parameter, Callable[[], object]]:
    """A parameter, and a call of the operation on it as the optimizer makes it."""
    parameter = nn.Parameter(torch.randn(shape, device="cuda", dtype=dtype) * 0.02)
    parameter.grad = torch.randn_like(parameter) * 1e-3
    optimizer = bnb.optim.AdamW8bit([parameter], lr=1e-5)
    optimizer.step()
    group = optimizer.param_groups[0]
    return parameter, lambda: optimizer.update_step(group, parameter, 0, 0)


def of_both(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``measure`` finds of bitsandbytes' kernels, and of ours in their place."""
    theirs = measure()
    install()
    try:
        ours = measure()
    finally:
        uninstall()
    return {"bitsandbytes": theirs, "qsharded": ours}


def one_tensor(shape: tuple[int, int], dtype: torch.dtype, work: Work) -> dict[str, Any]:
    parameter, step = operation(shape, dtype)
    found = of_both(lambda: {"gpu": gpu_ms(step, work), "waited_for": waited_ms(step)})
    limit = gpu_ms(copy_of_bytes(step_bytes([parameter])), work)
    free()
    return {"shape": shape, "limit": limit, **found, "times_as_fast": ratios(found)}


def whole_optimizer(name: str, held: list[nn.Parameter], work: Work) -> dict[str, Any]:
    def measure() -> dict[str, Any]:
        optimizer = getattr(bnb.optim, name)(held, lr=1e-5)
        result = {"gpu": gpu_ms(optimizer.step, work)}
        free()
        return result

    found = of_both(measure)
    return {"optimizer": name, "tensors": len(held), **found, "times_as_fast": ratios(found)}


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """By how much ours is faster, by the medians."""
    theirs, ours = found["bitsandbytes"], found["qsharded"]
    return {name: theirs[name]["median"] / ours[name]["median"] for name in theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the parameters")
    parser.add_argument("--layers", type=int, default=32, help="decoder layers of the whole optimizers")
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or optimizer_kernels(torch.device("cuda")) is not cuda_adamw8bit:
        sys.exit("this measures a GPU with the compiled library, and one of them is missing")
    bitsandbytes_optimizer.FEWEST_VALUES = 0  # small tensors too, to see from where on ours pays
    torch.manual_seed(0)
    dtype, work = getattr(torch, arguments.dtype), Work()
    work(8)
    tensors = [one_tensor(shape, dtype, work) for shape in SHAPES]
    held = adapters(arguments.layers, dtype)
    record = environment() | {
        "command": command("benchmarks.bitsandbytes_optimizer"),
        "dtype": arguments.dtype,
        "tensors": tensors,
        "optimizers": [whole_optimizer(name, held, work) for name in OPTIMIZERS],
    }
    print(json.dumps(record, indent=2))
    if arguments.record:
        write(arguments.record, record)


if __name__ == "__main__":
    main()
