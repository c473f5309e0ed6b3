"""A run that has no room left says what was planned, what was measured, and which settings fit; one rank tells it."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch.distributed.fsdp import FSDPModule

from qsharded.config import TrainConfig
from qsharded.distributed.choose_layout import free_gpu_memory
from qsharded.distributed.world import World
from qsharded.models import CausalLM
from qsharded.plan.alternatives import nearest
from qsharded.plan.choose_checkpointing import choose_checkpointing
from qsharded.plan.dry_run import planner_of
from qsharded.plan.gpu_memory import Plan, Planner
from qsharded.plan.host_memory import host_memory
from qsharded.plan.parameters import tensors_by_class
from qsharded.plan.rendering import suggestions
from qsharded.utils import hardware, heartbeat
from qsharded.utils.exit_codes import OUT_OF_MEMORY
from qsharded.utils.hardware import GIB
from qsharded.utils.sharding import local


class NoRoom(Exception):
    """A GPU or the host had no room for what the run asked for.

    Args:
        explain: gives the message for the user. It plans, which takes seconds, so it is called once the other ranks
            know that this one tells the cause.

    Attributes:
        exit_status: of every rank, as a launcher passes on that of the first one that leaves.
    """

    exit_status = OUT_OF_MEMORY

    def __init__(self, explain: Callable[[], str]) -> None:
        super().__init__()
        self.explain = explain


@contextmanager
def memory_errors_end(prog: str, world: World) -> Iterator[None]:
    """Turn NoRoom into its message and exit status OUT_OF_MEMORY."""
    try:
        yield
    except NoRoom as error:
        print(f"{prog}: error (rank {world.rank}): {error.explain()}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_status) from None


@contextmanager
def memory_errors_explained(config: TrainConfig, world: World, model: CausalLM | None = None) -> Iterator[None]:
    """Raise NoRoom in the place of PyTorch's error for memory, and of Python's.

    Args:
        model: as it trains, for what its classes take; None while it is loaded.
    """
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not _is_of_memory(error):
            raise
        raise NoRoom(partial(_explanation, config, world, model, error)) from None


def _is_of_memory(error: BaseException) -> bool:
    """CUDA's own calls, and the allocator of host memory, raise plain RuntimeErrors."""
    said = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or "CUDA error: out of memory" in said
        or "can't allocate memory" in said
    )


def _explanation(config: TrainConfig, world: World, model: CausalLM | None, error: BaseException) -> str:
    first = str(error).partition("\n")[0].partition(" If reserved")[0] or type(error).__name__
    where = "GPU" if isinstance(error, torch.OutOfMemoryError) or "CUDA" in first else "host"
    lines = [f"out of {where} memory in {heartbeat.OWN.where}: {first}"]
    try:  # the plan is a help, no reason for another error
        lines += _of_gpu(config, world, model) if where == "GPU" else host_plan(config, world.size)
    except (ValueError, OSError) as why:
        lines.append(f"  its memory could not be planned: {why}")
    return "\n".join(lines)


def _of_gpu(config: TrainConfig, world: World, model: CausalLM | None) -> list[str]:
    planner, _ = planner_of(config)
    planner = replace(planner, gpu_bytes=_room(planner, world))  # what the run chose its settings for
    plan = _plan(planner, config, world.size)
    try:
        measured = _measured(model, world)
    except RuntimeError:  # the allocator or FSDP2 may be in no state to be asked
        measured = Counter()
    names = dict.fromkeys([*(row.name for row in plan.rows), *measured])
    planned = Counter[str]()
    for row in plan.rows:
        if plan.peak_phase in row.phases:
            planned[row.name] += row.bytes
    table = [f"  {name:<24}{_gib(planned.get(name)):>9}{_gib(measured.get(name)):>10}" for name in names]
    table.append(f"  {'allocated at the peak':<24}{_gib(plan.allocated):>9}{_gib(_peak(world)):>10}")
    # What fits by the plan did not fit: what is suggested must need less.
    smaller = min(plan.needed - 1, planner.gpu_bytes or plan.needed)
    less = replace(planner, gpu_bytes=smaller)
    lines = suggestions(replace(plan, gpu_bytes=smaller), nearest(less, replace(plan, gpu_bytes=smaller)))
    return [f"  {'GPU memory, GiB':<24}{'planned':>9}{'measured':>10}", *table, *lines]


def _room(planner: Planner, world: World) -> int | None:
    """Bytes that this rank may have of its GPU, where others may be at home too; None where there is no GPU."""
    return free_gpu_memory(world.device) if world.device.type == "cuda" else planner.gpu_bytes


def _plan(planner: Planner, config: TrainConfig, ranks: int) -> Plan:
    chosen, _ = choose_checkpointing(planner, config, ranks, hardware.available_memory() // ranks)
    return planner.plan(chosen, ranks)


def host_plan(config: TrainConfig, ranks: int) -> list[str]:
    """A line on what was planned of host memory, and what there is.

    Raises:
        ValueError: a mistake of the user's, named.
    """
    planner, _ = planner_of(config)
    needs = host_memory(planner.model, _plan(planner, config, ranks))
    listed = ", ".join(f"{need.name} {need.bytes / GIB:.1f}" for need in needs)
    return [
        f"planned for a rank, GiB: {listed}; {ranks} ranks share "
        f"{hardware.memory() / GIB:.1f}, of which {hardware.available_memory() / GIB:.1f} are available now"
    ]


def _measured(model: CausalLM | None, world: World) -> Counter[str]:
    """Bytes on this rank's device by the plan's classes, of what the model and its gradients hold.

    The layer in which memory ended may be gathered: as the run is over, it is given up, so that its own rows count.
    """
    found = Counter[str]()
    for module in model.modules() if model is not None else ():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(True, recurse=False)  # else one that is in its forward stays gathered
            module.reshard()
    for kind, tensor in tensors_by_class(model) if model is not None else ():
        own = local(tensor)
        found[kind] += own.nbytes if own.device.type == world.device.type else 0
        if tensor.grad is not None:
            found["gradients"] += local(tensor.grad).nbytes
    return found


def _peak(world: World) -> int | None:
    return torch.cuda.max_memory_allocated(world.device) if world.device.type == "cuda" else None


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / GIB:.3f}"
