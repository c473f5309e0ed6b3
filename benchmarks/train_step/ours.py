"""One case of ours, in this process: a model with random weights takes steps on random tokens.

python -m benchmarks.train_step.ours CASE.json RESULT.json
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from benchmarks.train_step.case import Case
from benchmarks.train_step.gpu_activity import profiled
from qsharded.checkpoint import load_model
from qsharded.checkpoint.adapter import trainable
from qsharded.data import Batch
from qsharded.distributed.fsdp import let_reserved_memory_grow
from qsharded.models.attention_inputs import Boundaries
from qsharded.nn import LoRAConfig
from qsharded.optim import PagedAdamW8bit, clipping_scale
from qsharded.training.objective import batch_loss

WARM_UP = 3


def main() -> None:
    case = Case(**json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(measure(case)))


def measure(case: Case) -> dict[str, Any]:
    """Milliseconds of a step, of the host's part of it, and memory; on a GPU what it did, too."""
    let_reserved_memory_grow()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = _stepper(case, device)
    walls, hosts = [], []
    for _ in range(WARM_UP + case.steps):
        began = time.perf_counter()
        step()
        hosts.append(time.perf_counter() - began)
        _wait(device)
        walls.append(time.perf_counter() - began)
    result: dict[str, Any] = {
        "step_ms": 1e3 * statistics.median(walls[WARM_UP:]),
        "host_ms": 1e3 * statistics.median(hosts[WARM_UP:]),
        "first_step_s": walls[0],
    }
    if device.type == "cuda":
        gib = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        result |= {f"{name}_gib": size / 2**30 for name, size in gib.items()} | profiled(step)
    return result


def _stepper(case: Case, device: torch.device) -> Callable[[], Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(case.shape))
        model = load_model(
            folder,
            lora=LoRAConfig(r=case.rank, dtype=getattr(torch, case.lora_dtype)),
            device=device,
            random_init=True,
            activation_checkpointing=case.checkpointing,  # type: ignore[arg-type]  # checked by the command line
        )
    parameters = [parameter for _, parameter in trainable(model)]
    optimizer = PagedAdamW8bit(parameters, lr=1e-4)
    batch = random_batch(case).to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def step() -> Tensor:
        optimizer.prefetch()
        loss = batch_loss(model, batch) / case.tokens
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        optimizer.step(grad_scale=clipping_scale(norm, 1.0))
        optimizer.zero_grad()
        return loss

    return step


def random_batch(case: Case) -> Batch:
    """Random tokens, each to predict the next, in rows of as many documents."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, case.shape["vocab_size"], (case.rows, case.length), generator=generator)
    cuts = sorted(Random(0).sample(range(1, case.length), case.documents - 1))
    lengths = [stop - start for start, stop in zip([0, *cuts], [*cuts, case.length], strict=True)]
    positions = torch.cat([torch.arange(length) for length in lengths]).repeat(case.rows, 1)
    if case.documents == 1:
        return Batch(ids, ids.roll(-1, 1), positions, None)
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).repeat(case.rows, 1)
    return Batch(ids, ids.roll(-1, 1), positions, numbers, Boundaries.of(numbers))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
