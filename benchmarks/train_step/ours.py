"""One case of ours, in this process: a model with random weights takes steps on random tokens.

python -m benchmarks.train_step.ours CASE.json RESULT.json
"""

import itertools
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

from benchmarks.train_step.case import Case
from benchmarks.train_step.gpu_activity import profiled
from qsharded.checkpoint import load_model
from qsharded.checkpoint.adapter import trainable
from qsharded.config import TrainConfig
from qsharded.data import Batch
from qsharded.data.batches import padded
from qsharded.distributed.world import let_reserved_memory_grow
from qsharded.models import ModelConfig
from qsharded.models.attention_inputs import Boundaries
from qsharded.nn import LoRAConfig
from qsharded.optim import PagedAdamW8bit, clipping_scale
from qsharded.plan.choose_checkpointing import choose_checkpointing
from qsharded.plan.gpu_memory import Planner
from qsharded.training.host_work import little_host_work
from qsharded.training.objective import batch_loss
from qsharded.utils import hardware
from qsharded.utils.checkpointing_modes import Checkpointing

WARM_UP = 3
_SETTLED = 20  # steps after which rows of ever other lengths are to be as fast as they get


def main() -> None:
    case = Case(**json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(measure(case)))


def measure(case: Case) -> dict[str, Any]:
    """Milliseconds of a step, of the host's part of it, and memory; on a GPU what it did, too.

    As the trainer does, the host waits for a step once it has queued the next.
    """
    let_reserved_memory_grow()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = _stepper(case, device)
    with little_host_work():
        return _timed(step, case, device)


def _timed(step: Callable[[Batch], None], case: Case, device: torch.device) -> dict[str, Any]:
    lengths = list(itertools.islice(itertools.cycle(case.lengths()), WARM_UP + case.steps))
    batches = [random_batch(case, length if case.shortest is None else padded(length)) for length in lengths]
    began, hosts, marks = time.perf_counter(), [], []
    for number, batch in enumerate(batches):
        start = time.perf_counter()
        step(batch.to(device))
        hosts.append(time.perf_counter() - start)
        marks.append(_Mark(device))
        marks[max(0, number - 1)].wait()
    marks[-1].wait()
    first = WARM_UP if case.shortest is None else _SETTLED
    seconds = [after.seconds_since(before) for before, after in itertools.pairwise(marks)][first - 1 :]
    average = statistics.median if case.shortest is None else statistics.mean
    result: dict[str, Any] = {
        "tokens": case.rows * statistics.mean(lengths[first:]),
        "step_ms": 1e3 * average(seconds),
        "slowest_step_ms": 1e3 * max(seconds),
        "host_ms": 1e3 * statistics.median(hosts[first:]),
        "first_step_s": marks[0].at - began,
    }
    if device.type == "cuda":
        gib = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        result |= {f"{name}_gib": size / 2**30 for name, size in gib.items()}
        result |= profiled(lambda: step(batches[-1].to(device)))
    return result


class _Mark:
    """The end of what the device has been given so far."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event:
            self._event.record()
        self.at = time.perf_counter()

    def wait(self) -> None:
        """Until the device has come there; ``at`` is when that was seen first."""
        if self._event:
            pending = not self._event.query()
            self._event.synchronize()
            self.at = time.perf_counter() if pending else self.at

    def seconds_since(self, other: "_Mark") -> float:
        """By the device's clock."""
        if self._event and other._event:
            return other._event.elapsed_time(self._event) / 1e3
        return self.at - other.at


def _stepper(case: Case, device: torch.device) -> Callable[[Batch], None]:
    lora = LoRAConfig(r=case.rank, dtype=getattr(torch, case.lora_dtype))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(case.shape))
        model = load_model(
            folder,
            lora=lora,
            device=device,
            random_init=True,
            activation_checkpointing=checkpointing(case, lora),
            model_code=case.model_code,  # type: ignore[arg-type]  # from a case's JSON
        )
    parameters = [parameter for _, parameter in trainable(model)]
    optimizer = PagedAdamW8bit(parameters, lr=1e-4)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def step(batch: Batch) -> None:
        optimizer.prefetch()
        (batch_loss(model, batch) / batch.input_ids.numel()).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        optimizer.step(grad_scale=clipping_scale(norm, 1.0))
        optimizer.zero_grad()

    return step


def checkpointing(case: Case, lora: LoRAConfig) -> Checkpointing:
    """The case's, or the trainer's choice for a GPU of the case's size."""
    config = TrainConfig(
        model="m",
        dataset="d",
        per_device_train_batch_size=case.rows,
        max_length=case.length,
        activation_checkpointing=case.checkpointing,  # type: ignore[arg-type]  # checked by the command line
    )
    if case.checkpointing != "auto":
        return config.checkpointing
    assert case.memory_gib is not None, "of which size?"
    planner = Planner(ModelConfig.from_hf(case.shape), lora, torch.bfloat16, int(case.memory_gib * 2**30))
    return choose_checkpointing(planner, config, 1, host_bytes=hardware.available_memory())[0].checkpointing


def random_batch(case: Case, length: int) -> Batch:
    """Random tokens, each to predict the next, in rows of ``length`` of as many documents."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, case.shape["vocab_size"], (case.rows, length), generator=generator)
    cuts = sorted(Random(0).sample(range(1, length), case.documents - 1))
    lengths = [stop - start for start, stop in zip([0, *cuts], [*cuts, length], strict=True)]
    positions = torch.cat([torch.arange(length) for length in lengths]).repeat(case.rows, 1)
    if case.documents == 1:
        return Batch(ids, ids.roll(-1, 1), positions, None)
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).repeat(case.rows, 1)
    return Batch(ids, ids.roll(-1, 1), positions, numbers, Boundaries.of(numbers))


if __name__ == "__main__":
    main()
